"""Request balancers over data-parallel ranks, and the replay that scores them."""

if __name__ != "eplb.runtime.requests":
    raise ImportError(
        "import eplb.runtime.requests; the bare name would make a second copy of its classes"
    )

from eplb.runtime.requests.chunks import ChunkPlanner
from eplb.runtime.requests.cost import DecodeCost, PrefillCost, decode_cost, prefill_cost
from eplb.runtime.requests.decode import DecodeBalancer, DecodeOptions
from eplb.runtime.requests.guarded import GuardedDecodeBalancer
from eplb.runtime.requests.prefill import PrefillBalancer
from eplb.runtime.requests.values import (
    Assignment,
    DecodeRequest,
    Placed,
    PrefillRequest,
    RankState,
    Refused,
    Swap,
)

__all__ = [
    "Assignment",
    "ChunkPlanner",
    "DecodeBalancer",
    "DecodeCost",
    "DecodeOptions",
    "DecodeRequest",
    "GuardedDecodeBalancer",
    "Placed",
    "PrefillBalancer",
    "PrefillCost",
    "PrefillRequest",
    "RankState",
    "Refused",
    "Swap",
    "decode_cost",
    "prefill_cost",
]
