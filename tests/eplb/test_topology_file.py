"""Measured topologies: what files can say, and what is refused."""

from contextlib import suppress

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from eplb.errors import EplbError, InvalidInput
from eplb.topology import Topology
from eplb.topology_file import is_topology_file, read_topology, with_bandwidths

MEASURED = """\
num_nodes: 2
ranks_per_node: 4
intra_node_bytes_per_s: 3.1e11
inter_node_bytes_per_s: 42000000000
ranks_out_of_service: [5]
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text(MEASURED)
    return file


def test_counts_come_from_the_file_and_from_the_options(path):
    found = read_topology(str(path), slots_per_rank=9)
    assert found == Topology(
        num_nodes=2,
        ranks_per_node=4,
        slots_per_rank=9,
        intra_node_bytes_per_s=3.1e11,
        inter_node_bytes_per_s=4.2e10,
        ranks_out_of_service=(5,),
    )
    with pytest.raises(InvalidInput, match=r"slots_per_rank is missing.*--slots-per-rank"):
        read_topology(path, num_nodes=2)
    with pytest.raises(InvalidInput, match="num_nodes is 2 and 3 was asked for"):
        read_topology(str(path), slots_per_rank=9, num_nodes=3)


def test_slots_of_each_rank_say_how_many_there_are(path):
    path.write_text("num_nodes: 1\nranks_per_node: 2\nrank_slots: [3, 2]\n")
    found = read_topology(path)
    assert (found.slots_per_rank, found.rank_slots) == (3, (3, 2))


def test_bandwidths_replace_those_of_a_plan_and_say_where_they_are_from(path):
    plan = Topology(num_nodes=4, ranks_per_node=8, slots_per_rank=9)
    found, source = with_bandwidths(plan, str(path))
    assert (found.intra_node_bytes_per_s, found.num_nodes) == (3.1e11, 4)
    assert found.ranks_out_of_service == ()
    assert source == f"file {path}"
    assert with_bandwidths(plan, None) == (plan, "plan")
    preset, source = with_bandwidths(plan, "h800")
    assert (preset.inter_node_bytes_per_s, source) == (50e9, "preset h800")


def test_presets_and_files_are_told_apart():
    assert not is_topology_file("h800")
    assert is_topology_file("h800.yaml")
    assert is_topology_file("clusters/mine")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("[1, 2]", "is not a topology"),
        ("num_nodes: 2", "ranks_per_node is missing"),
        (
            "num_nodes: two\nranks_per_node: 4\nslots_per_rank: 1",
            "num_nodes must be a whole number",
        ),
        (
            "num_nodes: 2\nranks_per_node: 4\nranks_out_of_service: 3\nslots_per_rank: 1",
            "must be ranks from 0 to 7",
        ),
        (
            "num_nodes: 2\nranks_per_node: 4\nintra_node_bytes_per_s: .nan\nslots_per_rank: 1",
            "positive number",
        ),
        ("num_nodes: 2\nnum_nodes: 2", "comes twice"),
        ("num_nodes: {", "not the YAML of a topology"),
    ],
)
def test_files_that_are_no_topology(path, text, message):
    path.write_text(text)
    with pytest.raises(InvalidInput, match=message) as error:
        read_topology(path)
    assert str(path) in str(error.value)


def test_unknown_keys_are_named(path):
    path.write_text(MEASURED + "measured_on: today\n")
    with pytest.warns(UserWarning, match="measured_on"):
        read_topology(path, slots_per_rank=2)


def test_a_missing_file(tmp_path):
    with pytest.raises(InvalidInput, match="does not exist"):
        read_topology(tmp_path / "none.yaml")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@pytest.mark.filterwarnings("ignore::UserWarning")
@given(
    st.dictionaries(st.sampled_from([*Topology.__dataclass_fields__, "odd"]), values, max_size=8)
)
def test_any_values_are_read_or_refused(tmp_path_factory, document):
    path = tmp_path_factory.mktemp("fuzz") / "t.yaml"
    path.write_text(yaml.safe_dump(document))
    with suppress(EplbError):
        assert isinstance(read_topology(path), Topology)
