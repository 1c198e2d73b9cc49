"""Plan files: what is written is read, and nothing else is."""

import datetime as dt
import warnings

import numpy as np
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import ALL_SPLITS, plans

import eplb
from eplb.errors import EplbError, InvalidInput, PlacementInvalid
from eplb.load_profile import LoadProfile
from eplb.model import MoEModel
from eplb.plan import Plan, Quality
from eplb.slots import Placement
from eplb.topology import topology_preset


def small_plan():
    model = MoEModel(name="toy", num_experts=4, layer_ids=(3, 10), top_k=2, expert_bytes=1000)
    slots = [[0, 1, 2, 3, 0, -1], [3, 2, 1, 0, 3, 2]]
    return Plan(
        model=model,
        topology=topology_preset("h800", num_nodes=1, ranks_per_node=3, slots_per_rank=2),
        placement=Placement(
            phys_to_log_LS=np.array(slots), layer_ids=model.layer_ids, num_experts=4
        ),
        quality=Quality(
            imbalance_mean=1.1, imbalance_worst=1.2, bound_mean=1.0, gap_mean=0.10000000000000009
        ),
        provenance={"solver": "greedy", "seed": 0, "versions": {"python": "3.11"}},
    )


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "plan.yaml"
    eplb.write_plan(small_plan(), path)
    return path


def read(text, tmp_path):
    path = tmp_path / "changed.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return eplb.read_plan(path)


@given(plan=plans(splits=ALL_SPLITS))
def test_a_plan_comes_back_as_it_was(plan, tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.yaml"
    eplb.write_plan(plan, path)
    assert eplb.read_plan(path) == plan


def test_everything_in_a_plan_comes_back(path):
    assert eplb.read_plan(path) == small_plan()
    assert eplb.read_plan(path).digest() == small_plan().digest()


def test_layout_is_the_documented_one(path):
    lines = path.read_text().splitlines()
    assert lines[0] == "schema: eplb/plan@1"
    assert "  3: [0, 1, 2, 3, 0, -1]" in lines
    document = yaml.safe_load(path.read_text())
    assert list(document) == [
        "schema", "model", "topology", "split", "objective", "layers", "quality", "provenance",
        "digest",
    ]  # fmt: skip
    assert document["layers"] == {3: [0, 1, 2, 3, 0, -1], 10: [3, 2, 1, 0, 3, 2]}
    assert document["objective"] == {"statistic": "mean"}
    assert document["model"]["expert_bytes"] == 1000
    assert document["digest"].startswith("sha256:")


def test_digest_is_the_documented_one(path):
    import hashlib
    import json

    document = yaml.safe_load(path.read_text())
    content = {k: v for k, v in document.items() if k not in {"quality", "provenance", "digest"}}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert document["digest"] == "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def test_quality_survives_to_the_last_bit(tmp_path):
    profile = LoadProfile.from_counts(np.random.default_rng(0).lognormal(0, 1, (7, 2, 12)))
    problem = eplb.Problem(
        profile=profile,
        model=MoEModel(name="toy", num_experts=12, layer_ids=(0, 1)),
        topology=eplb.Topology(num_nodes=1, ranks_per_node=4, slots_per_rank=4),
    )
    solution = eplb.solve(problem)
    plan = Plan(
        model=problem.model,
        topology=problem.topology,
        placement=solution.placement,
        quality=Quality(
            imbalance_mean=solution.objective,
            imbalance_worst=solution.balance.imbalance_worst,
            bound_mean=solution.bound,
            gap_mean=solution.gap,
        ),
    )
    eplb.write_plan(plan, tmp_path / "plan.yaml")
    eplb.check_plan(eplb.read_plan(tmp_path / "plan.yaml"), profile, distinct_ranks=True)


CHANGES = [
    ("a flipped slot", "[0, 1, 2, 3, 0, -1]", "[0, 1, 2, 3, 1, -1]", InvalidInput, "digest is"),
    ("another rank count", "num_nodes: 1", "num_nodes: 2", InvalidInput, "digest is"),
    ("another schema", "plan@1", "plan@2", InvalidInput, "this version reads eplb/plan@1"),
    ("no schema", "schema:", "scheme:", InvalidInput, "this version reads"),
    ("a repeated layer", "  10:", "  3:", InvalidInput, "key '3' comes twice"),
    ("a layer repeated in other digits", "  10:", "  0x3:", InvalidInput, "key '0x3' comes twice"),
    ("no layers", "layers:", "layer:", InvalidInput, "layers is missing"),
    ("no model", "model:", "models:", InvalidInput, "model is missing"),
    ("a named layer", "  10:", "  ten:", InvalidInput, "keyed by decoder layer ids"),
    ("an earlier layer", "  10:", "  1:", InvalidInput, "increasing order"),
    ("text for a slot", "[0, 1, 2,", "[0, one, 2,", PlacementInvalid, "'one' is not an expert id"),
    ("half an expert", "[0, 1, 2,", "[0, 1.5, 2,", PlacementInvalid, "1.5 is not an expert id"),
    ("a truth", "[0, 1, 2,", "[0, true, 2,", PlacementInvalid, "True is not an expert id"),
    ("a huge expert", "[0, 1, 2,", f"[0, {2**70}, 2,", PlacementInvalid, "is not an expert id"),
    ("no list", "[0, 1, 2, 3, 0, -1]", "7", PlacementInvalid, "must be a list"),
    ("no quality figure", "bound_mean: 1.0, ", "", InvalidInput, "quality.bound_mean must be"),
    ("a NaN", "bound_mean: 1.0", "bound_mean: .nan", InvalidInput, "must be a finite number"),
    ("a huge figure", "bound_mean: 1.0", f"bound_mean: {10**400}", InvalidInput, "finite number"),
    ("an alias", "provenance:", "x: &a [1]\ny: *a\nprovenance:", InvalidInput, "aliases"),
    ("a merge key", "provenance:", "x: {<<: {a: 1}}\nprovenance:", InvalidInput, "merge keys"),
    ("broken YAML", "layers:", "layers: [", InvalidInput, "not the YAML"),
]  # fmt: skip
WITHOUT_DIGEST = [
    ("a short layer", ", -1]", "]", PlacementInvalid, "layer 3 has 5 slots; 3 ranks x 2"),
    ("an unknown expert", "[0, 1, 2,", "[0, 4, 2,", PlacementInvalid, "slot 1: unknown expert 4"),
    ("a missing expert", "[0, 1, 2,", "[0, 0, 2,", PlacementInvalid, "expert 1 is missing"),
    ("a wrong split", "split: even", "split: evn", InvalidInput, "'evn'; did you mean 'even'"),
    ("a weird split", "split: even", "split: [1]", InvalidInput, "unknown split rule"),
    ("no ranks", "ranks_per_node: 3, ", "", InvalidInput, "topology.ranks_per_node is missing"),
    ("text for a count", "num_nodes: 1", "num_nodes: one", InvalidInput, "num_nodes must be"),
    ("no experts", "num_experts: 4, ", "", InvalidInput, "model.num_experts is missing"),
    ("a list for a name", "name: toy", "name: [toy]", InvalidInput, "model.name must be"),
    ("a number for a name", "name: toy", "name: 7", InvalidInput, "name of a model must be text"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "old", "new", "error", "message"), CHANGES)
def test_changes_are_refused(path, tmp_path, what, old, new, error, message):
    text = path.read_text()
    assert old in text
    with pytest.raises(error, match=message) as raised, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read(text.replace(old, new, 1), tmp_path)
    assert "changed.yaml" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("what", "old", "new", "error", "message"), WITHOUT_DIGEST)
def test_handwritten_plans_are_checked_too(path, tmp_path, what, old, new, error, message):
    text = path.read_text()
    text = text[: text.index("digest:")]
    assert old in text
    with pytest.raises(error, match=message), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read(text.replace(old, new, 1), tmp_path)


def test_a_plan_without_digest_is_read_with_a_warning(path, tmp_path):
    text = path.read_text()
    with pytest.warns(UserWarning, match="no digest"):
        plan = read(text[: text.index("digest:")], tmp_path)
    assert plan == small_plan()


def test_unknown_keys_are_ignored_with_a_warning(path, tmp_path):
    text = path.read_text().replace("quality:", "notes: by hand\nquality:")
    text = text[: text.index("digest:")].replace("{num_nodes", "{num_node: 1, num_nodes")
    with pytest.warns(UserWarning, match="ignored|no digest") as caught:
        assert read(text, tmp_path) == small_plan()
    messages = [str(w.message) for w in caught]
    assert any("'notes'" in message for message in messages)
    assert any("'num_node'; did you mean 'num_nodes'" in message for message in messages)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "is a directory"),
        (lambda path: path.touch(), "is empty"),
        (lambda path: path.write_text("- 1\n"), "is not a plan"),
        (lambda path: path.write_text("a: &a [*a]\n"), "not the YAML|schema"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00\x01"), "not"),
        (lambda path: path.write_text("!!python/object:os.system {}"), "not the YAML"),
    ],
)
def test_files_that_are_no_plans(tmp_path, make, message):
    path = tmp_path / "plan.yaml"
    make(path)
    with pytest.raises(InvalidInput, match=message):
        eplb.read_plan(path)


def test_a_crash_while_writing_leaves_the_old_plan(path, monkeypatch):
    def crash(*_):
        raise OSError(28, "No space left on device")

    before = path.read_bytes()
    monkeypatch.setattr("eplb.files.os.fsync", crash)
    with pytest.raises(InvalidInput, match="No space left"):
        eplb.write_plan(small_plan(), path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def only_eplb_errors(text, folder):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            read(text, folder)
    except EplbError as error:
        assert "\n" not in str(error)  # noqa: PT017


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def valid(folder):
    eplb.write_plan(small_plan(), folder / "valid.yaml")
    return (folder / "valid.yaml").read_bytes()


@settings(max_examples=1500)
@given(data=st.data())
def test_fuzzed_bytes_raise_only_our_errors(folder, valid, data):
    text = bytearray(valid)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text) - 1))
        piece = data.draw(
            st.one_of(
                st.binary(max_size=3),
                st.sampled_from([b"[", b"{", b"&a ", b"*a ", b"!!", b": ", b"- ", b"\t", b"~"]),
            )
        )
        text[at : at + data.draw(st.integers(0, 8))] = piece
    only_eplb_errors(bytes(text), folder)


VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
        st.dates(), st.binary(max_size=4),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.text(max_size=4), st.integers()), inner, max_size=4),
    ),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=1500)
@given(data=st.data())
def test_fuzzed_structures_raise_only_our_errors(folder, valid, data):
    document = yaml.load(valid, yaml.CSafeLoader)
    if data.draw(st.booleans()):
        document.pop("digest")
    for _ in range(data.draw(st.integers(1, 3))):
        target = document
        key = data.draw(st.sampled_from(sorted(document)))
        while isinstance(target.get(key), dict) and target[key] and data.draw(st.booleans()):
            target = target[key]
            key = data.draw(st.sampled_from(sorted(target, key=str)))
        target[key] = data.draw(VALUES)
    only_eplb_errors(yaml.dump(document, Dumper=yaml.CSafeDumper, sort_keys=False), folder)


@settings(max_examples=300)
@given(st.text(max_size=60))
@example("[" * 3000)
@example("{a: " * 2000)
@example("schema: eplb/plan@1\nlayers: {1: [" + "1," * 50000)
@example("schema: 2024-13-45")
@example("schema: !!timestamp abc")
@example("? [a, b]\n: 1")
@example("a: &a\n- &b [*a, *a]\n")
@example("<<: 1")
@example(f"schema: eplb/plan@1\nlayers: {{1: [{'9' * 5000}]}}")
def test_fuzzed_text_raises_only_our_errors(folder, text):
    only_eplb_errors(text.encode("utf-8", "surrogatepass"), folder)


def test_dates_are_not_counts(path, tmp_path):
    document = yaml.safe_load(path.read_text())
    document["topology"]["num_nodes"] = dt.date(2026, 1, 1)
    with pytest.raises(InvalidInput, match=r"topology.num_nodes must be"):
        read(yaml.safe_dump(document, sort_keys=False), tmp_path)
