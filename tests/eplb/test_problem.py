"""What cannot be asked of a solver."""

import numpy as np
import pytest

from eplb.errors import InfeasibleProblem, InvalidInput
from eplb.load_profile import LoadProfile
from eplb.model import MoEModel
from eplb.problem import Problem
from eplb.topology import Topology

PROFILE = LoadProfile.from_counts(np.ones((2, 8)), source="loads.npz")
MODEL = MoEModel(name="toy", num_experts=8, layer_ids=(0, 1), num_groups=4)


def problem(nodes=2, ranks=2, slots=3, model=MODEL, **options):
    topology = Topology(num_nodes=nodes, ranks_per_node=ranks, slots_per_rank=slots)
    return Problem(profile=PROFILE, model=model, topology=topology, **options)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (InfeasibleProblem, "use --slots-per-rank 2 or more", {"slots": 1}),
        (InfeasibleProblem, "more replicas than ranks: 8 experts on 4 ranks", {"slots": 9}),
        (InfeasibleProblem, "4 experts on the 2 ranks of a node", {"slots": 5,
                                                                  "groups_in_nodes": True}),
        (InvalidInput, "use 1, 2, 4 nodes", {"nodes": 3, "groups_in_nodes": True}),
        (InvalidInput, "did you mean 'even'", {"split": "evn"}),
        (InvalidInput, "unknown objective", {"statistic": "median"}),
        (InvalidInput, "loads.npz has 8 experts and big has 16",
         {"model": MoEModel(name="big", num_experts=16, layer_ids=(0, 1))}),
        (InvalidInput, "has load in 2 layers",
         {"model": MoEModel(name="deep", num_experts=8, layer_ids=(0, 1, 2))}),
    ],
)  # fmt: skip
def test_refused(error, message, change):
    with pytest.raises(error, match=message):
        problem(**change)


def test_shared_ranks_lift_the_limit_on_replicas():
    assert problem(slots=9, distinct_ranks=False).topology.num_slots == 36
