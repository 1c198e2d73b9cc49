"""Files that are no plans: an error names the file, the key and what was expected."""

import io
import json
import pickle
import zipfile

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from eplb.engines.convert import ENGINES, import_plan
from eplb.errors import EplbError, InvalidInput, PlacementInvalid
from eplb.model import model_preset

GOOD = {
    "sglang": {"physical_to_logical_map": [[0, 1, 2, 0], [2, 1, 0, 1]]},
    "vllm": {
        "record_type": "eplb_initial_mapping", "version": 1, "num_redundant_experts": 1,
        "num_slots": 4, "initial_global_assignments": {"0": [0, 1, 2, 0], "1": [2, 1, 0, 1]},
    },
    "tensorrt-llm": {
        "num_slots": 4, "initial_global_assignments": {3: [0, 1, 2, 0], 4: [2, 1, 0, 1]},
        "layer_updates_per_iter": 0,
    },
    "vllm-ascend": {
        "moe_layer_count": 1,
        "layer_list": [
            {
                "layer_id": 0, "device_count": 2,
                "device_list": [
                    {"device_id": 0, "device_expert": [0, 1]},
                    {"device_id": 1, "device_expert": [2, 0]},
                ],
            }
        ],
    },
}  # fmt: skip


def load(engine, path, ranks=2, **more):
    return import_plan(path, engine, num_nodes=1, ranks_per_node=ranks, **more)


def write(folder, engine, document):
    if engine == "tensorrt-llm":
        path = folder / "file.yaml"
        path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    else:
        path = folder / "file.json"
        path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


@pytest.mark.parametrize("engine", GOOD)
def test_the_good_ones_are_good(tmp_path, engine):
    assert load(engine, write(tmp_path, engine, GOOD[engine])).plan.model.num_experts == 3


def changed(engine, **values):
    return {**GOOD[engine], **values}


def device(**values):
    layer = GOOD["vllm-ascend"]["layer_list"][0]
    devices = [layer["device_list"][0], {**layer["device_list"][1], **values}]
    return changed("vllm-ascend", layer_list=[{**layer, "device_list": devices}])


LAYERS = "initial_global_assignments"


@pytest.mark.parametrize(
    ("engine", "document", "message"),
    [
        ("sglang", "", "file.json is empty"),
        ("sglang", "{", "file.json is not a readable JSON file"),
        ("sglang", "[]", "expected the keys physical_to_logical_map, got a list"),
        ("sglang", changed("sglang", source="plan"), "key 'source' is not one of physical_to"),
        ("sglang", {"logical_count": [[1]]}, "holds recorded loads and no placement"),
        ("sglang", '{"physical_to_logical_map": [[0]], "physical_to_logical_map": [[0]]}',
         "key 'physical_to_logical_map' comes twice"),
        ("sglang", {"physical_to_logical_map": [[0, 1], [0]]}, "[1] has 1 slots and"),
        ("sglang", {"physical_to_logical_map": [[0, "1"]]}, "slot 1 must be a whole number"),
        ("sglang", {"physical_to_logical_map": [[0, True]]}, "got True"),
        ("sglang", {"physical_to_logical_map": [[0, -1]]}, "from 0 to 1048576, got -1"),
        ("sglang", {"physical_to_logical_map": [[0, 10**4000]]}, "whole number of 13288 bits"),
        ("sglang", '{"physical_to_logical_map": [[0, 1e3]]}', "got 1000.0"),
        ("sglang", '{"physical_to_logical_map": [[NaN]]}', "NaN is no number of JSON"),
        ("sglang", {"physical_to_logical_map": []}, "must be a list of layers"),
        ("sglang", {"physical_to_logical_map": [[]]}, "[0] must be a list of expert ids"),
        ("sglang", {"physical_to_logical_map": [[0, 1, 3, 0]]}, "expert 2 is missing"),
        ("sglang", {"physical_to_logical_map": [[0, 1, 2]]}, "3 slots cannot be divided over 2"),
        ("sglang", "[" * 100000, "not a readable JSON file"),
        ("sglang", GOOD["vllm-ascend"], "looks like a file of vllm-ascend"),
        ("vllm", GOOD["sglang"], "looks like a file of sglang"),
        ("vllm", GOOD["vllm-ascend"], "looks like a file of vllm-ascend"),
        ("vllm", changed("vllm", version=2), "version must be 1, got 2; a newer vLLM"),
        ("vllm", changed("vllm", version=True), "version must be 1, got True"),
        ("vllm", changed("vllm", record_type="eplb_load_stats"), "must be 'eplb_initial_mapping'"),
        ("vllm", changed("vllm", num_slots=5), "num_slots is 5 and layer 0 has 4 slots"),
        ("vllm", changed("vllm", num_slots=2**60), "num_slots must be a whole number from 1 to"),
        ("vllm", changed("vllm", num_redundant_experts=2), "unknown expert 2"),
        ("vllm", changed("vllm", num_redundant_experts=0), "expert 3 is missing"),
        ("vllm", changed("vllm", **{LAYERS: {"1": [0, 1, 2, 0]}}), "must have the keys '0', '1'"),
        ("vllm", changed("vllm", **{LAYERS: []}), "must have the keys '0', '1'"),
        ("vllm", {"record_type": "eplb_initial_mapping"}, "key 'version' is missing"),
        ("tensorrt-llm", changed("tensorrt-llm", ep_size=2), "key 'ep_size' is not one of"),
        ("tensorrt-llm", {"num_slots": 4}, f"key '{LAYERS}' is missing"),
        ("tensorrt-llm", f"num_slots: 2\n{LAYERS}:\n  3: [0, 1]\n  3: [1, 0]\n",
         "key '3' comes twice"),
        ("tensorrt-llm", changed("tensorrt-llm", **{LAYERS: {"3": [0, 1, 2, 0]}}), "got '3'"),
        ("tensorrt-llm", changed("tensorrt-llm", **{LAYERS: {}}), "must map layer ids"),
        ("tensorrt-llm", changed("tensorrt-llm", num_slots=8), "num_slots is 8 and layer 3 has 4"),
        ("tensorrt-llm", changed("tensorrt-llm", layer_updates_per_iter=-1), "layer_updates_per"),
        ("tensorrt-llm", "!!python/object/apply:os.system [true]", "not a readable YAML file"),
        ("tensorrt-llm", "- 1", "expected the keys num_slots"),
        ("tensorrt-llm", "schema: eplb/plan@1", "looks like a file of this project"),
        ("vllm-ascend", changed("vllm-ascend", moe_layer_count=2), "moe_layer_count is 2 and"),
        ("vllm-ascend", device(device_id=0), "device_id must be a whole number from 1 to 1, got 0"),
        ("vllm-ascend", device(device_expert=[2]), "has 1 experts and device 0 has 2; every"),
        ("vllm-ascend", device(device_expert="2"), "must be a list of expert ids, got '2'"),
        ("vllm-ascend", device(more=1), "key 'more' is not one of device_id, device_expert"),
        ("vllm-ascend", GOOD["sglang"], "looks like a file of sglang"),
    ],
)  # fmt: skip
def test_bad_documents(tmp_path, engine, document, message):
    path = write(tmp_path, engine, document)
    with pytest.raises((InvalidInput, PlacementInvalid)) as error:
        load(engine, path)
    assert message in str(error.value)
    assert path.name in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_the_wrong_number_of_ranks(tmp_path):
    path = write(tmp_path, "vllm-ascend", GOOD["vllm-ascend"])
    with pytest.raises(InvalidInput, match="has 2 devices for 3 ranks; correct --nodes"):
        load("vllm-ascend", path, ranks=3)


@pytest.mark.parametrize("engine", ["vllm", "tensorrt-llm", "vllm-ascend", "sglang"])
def test_another_model(tmp_path, engine):
    path = write(tmp_path, engine, GOOD[engine])
    with pytest.raises((InvalidInput, PlacementInvalid), match=r"--moe-layers that the file was"):
        load(engine, path, model=model_preset("deepseek-v3"))


def test_a_name_that_the_engine_does_not_read(tmp_path):
    (tmp_path / "file.txt").write_text("{}")
    for engine in ENGINES:
        with pytest.raises(InvalidInput, match="reads plans from"):
            load(engine, tmp_path / "file.txt")
    with pytest.raises(InvalidInput, match="unknown engine 'vlm'; did you mean 'vllm'"):
        load("vlm", tmp_path / "file.txt")
    with pytest.raises(InvalidInput, match="does not exist"):
        load("sglang", tmp_path / "none.pt")


class Evil:
    def __reduce__(self):
        return (print, ("this was run",))


def test_pickles_are_not_run(tmp_path, capsys):
    (tmp_path / "evil.npy").write_bytes(
        b"\x93NUMPY\x01\x00v\x00"
        + b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
        + pickle.dumps(Evil())
    )  # fmt: skip
    with zipfile.ZipFile(tmp_path / "evil.pt", "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({"physical_to_logical_map": Evil()}))
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Evil()))
    for engine, name in (("omni", "evil.npy"), ("sglang", "evil.pt"), ("sglang", "raw.pt")):
        with pytest.raises(InvalidInput, match=name):
            load(engine, tmp_path / name)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 3), int), "must be whole numbers [devices, layers, experts], got"),
        (np.ones((2, 1, 3)), "got float64"),
        (np.full((2, 1, 3), 2), "must hold 0 and 1 only"),
        (np.ones((4, 1, 3), int), "is for 4 devices, not 2 ranks"),
        (np.zeros((2, 1, 3), int), "expert 0 is missing"),
    ],
)
def test_bad_patterns(tmp_path, array, message):
    np.save(tmp_path / "pattern.npy", array)
    with pytest.raises((InvalidInput, PlacementInvalid)) as error:
        load("omni", tmp_path / "pattern.npy")
    assert message in str(error.value)


def error_of(engine, path):
    """Return what loading says, or the path where it says nothing; other errors go through."""
    try:
        load(engine, path)
    except EplbError as error:
        return str(error)
    return str(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(
        st.sampled_from([k for d in GOOD.values() for k in d]) | st.text(max_size=3),
        children, max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@given(st.sampled_from(sorted(GOOD)), JSON, st.data())
def test_fuzzed_documents_raise_only_our_errors(tmp_path_factory, engine, value, data):
    """Whole documents, and good ones with one value exchanged."""
    good = GOOD[engine]
    key = data.draw(st.sampled_from([None, *good]))
    document = value if key is None else {**good, key: value}
    path = write(tmp_path_factory.mktemp("fuzz"), engine, document)
    assert path.name in error_of(engine, path)


@given(st.binary(max_size=200), st.sampled_from([".json", ".yaml", ".npy", ".pt"]))
def test_fuzzed_bytes_raise_only_our_errors(tmp_path_factory, data, suffix):
    path = tmp_path_factory.mktemp("fuzz") / f"file{suffix}"
    stream = io.BytesIO()
    np.save(stream, np.ones((2, 1, 2), np.int32))
    path.write_bytes(data if suffix != ".npy" else stream.getvalue()[: 100 + len(data)] + data)
    for name, engine in ENGINES.items():
        if suffix in engine.suffixes:
            assert path.name in error_of(name, path)
