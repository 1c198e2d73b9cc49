"""Does this machine run the expert-parallel layer? Random plans and swaps beside a reference.

Every process draws tokens, serves them, and computes what an unsharded layer gives; every few steps
the placement changes. The command line starts the processes (:mod:`eplb.runtime.launch`).
Shape letters: T tokens, H hidden size, K top-k, S slots.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from eplb.errors import InvalidInput, ServingFailed
from eplb.model import MoEModel
from eplb.plan import Plan
from eplb.runtime.ep.agreement import agree_on_plan
from eplb.runtime.ep.expert_slots import ExpertLayout, ExpertSlots
from eplb.runtime.ep.experts import gated_layout
from eplb.runtime.ep.group import EPGroup
from eplb.runtime.ep.layer import EPMoELayer
from eplb.runtime.ep.peer_buffers import PeerBuffers
from eplb.runtime.ep.reference import reference_output, relative_error
from eplb.runtime.ep.reload import exchange_rows
from eplb.runtime.ep.router import SigmoidRouter
from eplb.runtime.ep.tables import PlacementTables
from eplb.slots import Placement
from eplb.topology import Topology

__all__ = ["ERROR_BOUNDS", "Report", "Settings", "check", "run"]

# Largest error of a token that rounding explains. BF16 rounds a value by 0.11% in the root mean
# square, some six times on the way of a token, of which a few in ten thousand are four times as far
# off. FP8 keeps 3 bits of a mantissa: 2.6% in the root mean square, up to twice that behind the
# product in an expert, and as unlucky tokens.
ERROR_BOUNDS = {"fp32": 1e-5, "bf16": 1.5e-2, "fp8": 7.5e-2}

LAYER_ID = 3
NUM_EXPERTS, TOP_K = 24, 4
NUM_GROUPS, GROUPS_PER_TOKEN = 4, 2
SIZES = (0, 1, 3, 16, 33)
STEPS_PER_PLAN = 3
SPLITS = ("even", "nearest", "weighted", "batch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a self-test does.

    Parameters
    ----------
    steps : int
        Forwards of the layer.
    seed : int
    payload : str
        ``fp32``, ``bf16`` or ``fp8``.
    by_node : bool
        Cross by node; the group was made for it.
    micro_batches : int
    exchange : str
        ``collectives``, or ``peers``: over peer memory within a node.
    padded : bool
        With ``peers``: sizes that the host need not know.
    """

    steps: int
    seed: int = 0
    payload: str = "fp32"
    by_node: bool = False
    micro_batches: int = 1
    exchange: str = "collectives"
    padded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What came out, over all processes.

    Parameters
    ----------
    steps, swaps : int
        Forwards, and changes of the placement between them.
    max_relative_error : float
        Largest over tokens of |y - reference| / |reference|.
    tokens_lost : int
        Token-expert pairs that were routed and did not arrive, or arrived more than once.
    tokens, moved_experts : int
        Tokens served, and experts that crossed from process to process.
    """

    steps: int
    swaps: int
    max_relative_error: float
    tokens_lost: int
    tokens: int
    moved_experts: int

    def to_dict(self) -> dict[str, int | float]:
        """Return the figures."""
        return asdict(self)


def run(group: EPGroup, settings: Settings) -> Report:
    """Serve random tokens under random plans and compare. Collective.

    Raises
    ------
    ServingFailed
        A process found an error above its bound, or pairs were lost; all raise.
    """
    if settings.steps < 1:
        raise InvalidInput(f"steps ({settings.steps}) must be at least 1")
    state = _State(group, settings)
    for step in range(settings.steps):
        if step and step % STEPS_PER_PLAN == 0:
            state.swap()
        state.serve(step)
    report = state.report()
    check(report, settings)
    return report


def check(report: Report, settings: Settings) -> None:
    """Raise unless errors are what rounding explains, and nothing was lost.

    Raises
    ------
    ServingFailed
        They are not.
    """
    bound = ERROR_BOUNDS[settings.payload]
    # Not a number is above every bound.
    if not report.max_relative_error <= bound or report.tokens_lost:
        raise ServingFailed(
            f"selftest: largest relative error {report.max_relative_error:.3g} (at most {bound:g} "
            f"in {settings.payload}), {report.tokens_lost} token-expert pairs lost, in "
            f"{report.steps} steps and {report.swaps} swaps with --seed {settings.seed}; this "
            "machine does not run the layer correctly: report it with the output of `eplb versions`"
        )


class _State:
    """A layer with its experts, and the figures so far."""

    def __init__(self, group: EPGroup, settings: Settings) -> None:
        self.group, self.settings = group, settings
        # Where rounding is large, wide tokens keep it near its mean.
        wide = settings.payload != "fp32"
        self.hidden, inner = (512, 256) if wide else (64, 32)
        dtype = torch.float32 if settings.payload == "fp32" else torch.bfloat16
        self.dtype = dtype
        self.layout = gated_layout(self.hidden, inner, dtype)
        self.experts = _experts(self.layout, settings.seed, group.device)
        self.router = SigmoidRouter(
            self.hidden, NUM_EXPERTS, TOP_K, num_groups=NUM_GROUPS,
            groups_per_token=GROUPS_PER_TOKEN, scale=2.5,
        ).to(group.device)  # fmt: skip
        # The same in every process: plans and router. Apart: tokens.
        self.common = np.random.default_rng(settings.seed)
        self.own = np.random.default_rng([settings.seed, group.process])
        self.slots_per_rank = -(-NUM_EXPERTS // group.num_ranks) + int(self.common.integers(1, 3))
        self.router.weight.copy_(self._normal(NUM_EXPERTS, self.hidden) / self.hidden**0.5)
        self.router.bias.copy_(0.3 * self._normal(NUM_EXPERTS))
        self.swaps = self.tokens = self.lost = self.moved = 0
        self.worst = 0.0
        tables = self._agreed_tables()
        slots = ExpertSlots(
            self.layout, self.slots_per_rank * group.ranks_per_process, group.device
        )
        first = group.first_rank * self.slots_per_rank
        for slot in range(slots.num_slots):
            held = int(tables.phys_to_log_S[first + slot])
            if held >= 0:
                slots.load(slot, {name: every[held] for name, every in self.experts.items()})
        peers = None
        if settings.exchange == "peers":
            peers = PeerBuffers(
                group, max_tokens=max(SIZES), hidden_size=self.hidden, top_k=TOP_K,
                slots_per_rank=self.slots_per_rank, num_experts=NUM_EXPERTS,
                payload=settings.payload, micro_batches=settings.micro_batches,
            )  # fmt: skip
        self.layer = EPMoELayer(
            group, tables, slots, self.router, hidden_size=self.hidden,
            payload=settings.payload, by_node=settings.by_node,
            micro_batches=settings.micro_batches, peers=peers, padded=settings.padded,
        )  # fmt: skip

    def swap(self) -> None:
        """Go over to another random plan."""
        tables, layer = self._agreed_tables(), self.layer
        self.moved += exchange_rows(
            layer.slots, layer.tables.phys_to_log_S, tables.phys_to_log_S, self.slots_per_rank,
            self.group,
        )  # fmt: skip
        layer.install(tables)
        self.swaps += 1

    def serve(self, step: int) -> None:
        """Run one step of random tokens and compare."""
        layer, num_tokens = self.layer, int(self.own.choice(SIZES))
        x_TH = torch.from_numpy(
            self.own.standard_normal((num_tokens, self.hidden), dtype=np.float32)
        ).to(self.group.device, self.dtype)
        y_TH = layer(x_TH)
        topk_TK, weight_TK = self.router(x_TH)
        reference_TH = reference_output(x_TH, topk_TK, weight_TK, self.experts)
        self.worst = max(self.worst, relative_error(y_TH, reference_TH))
        pairs = torch.tensor([num_tokens * TOP_K, sum(layer.received_pairs), num_tokens])
        with self.group.watched(f"figures of step {step}"):
            dist.all_reduce(pairs, group=self.group.control)
        self.lost += abs(int(pairs[0] - pairs[1]))
        self.tokens += int(pairs[2])

    def report(self) -> Report:
        """Return the figures over all processes."""
        worst = torch.tensor(self.worst, dtype=torch.float64)
        with self.group.watched("figures"):
            dist.all_reduce(worst, dist.ReduceOp.MAX, group=self.group.control)
        return Report(
            steps=self.settings.steps,
            swaps=self.swaps,
            max_relative_error=float(worst),
            tokens_lost=self.lost,
            tokens=self.tokens,
            moved_experts=self.moved,
        )

    def _agreed_tables(self) -> PlacementTables:
        split = SPLITS[int(self.common.integers(len(SPLITS)))]
        plan = _random_plan(self.common, self.group, self.slots_per_rank, split)
        agree_on_plan(plan, plan.model, self.group)
        return PlacementTables.of_plan(plan, LAYER_ID, self.group)

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.from_numpy(self.common.standard_normal(shape, dtype=np.float32))


def _experts(layout: ExpertLayout, seed: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Return the tensors of all experts, the same in every process, each [E, ...]."""
    random = np.random.default_rng([seed, NUM_EXPERTS])
    return {
        name: torch.from_numpy(
            random.standard_normal((NUM_EXPERTS, *shape), dtype=np.float32)
            / np.float32(shape[-1] ** 0.5)
        ).to(device, dtype)
        for name, (shape, dtype) in layout.tensors.items()
    }


def _random_plan(
    random: np.random.Generator, group: EPGroup, slots_per_rank: int, split: str
) -> Plan:
    """Return a plan with every expert somewhere, and the other slots filled at random or empty."""
    num_slots = group.num_ranks * slots_per_rank
    slots_S = np.full(num_slots, -1)
    order = random.permutation(num_slots)
    slots_S[order[:NUM_EXPERTS]] = random.permutation(NUM_EXPERTS)
    spare = order[NUM_EXPERTS:]
    slots_S[spare] = random.integers(-1, NUM_EXPERTS, len(spare))
    weights_LS: Any = None
    if split == "weighted":
        raw_S = np.where(slots_S >= 0, random.exponential(size=num_slots), 0.0)
        filled = slots_S >= 0
        total_E = np.bincount(slots_S[filled], raw_S[filled], minlength=NUM_EXPERTS)
        weights_LS = (raw_S / total_E[slots_S])[np.newaxis]
    model = MoEModel(
        name="selftest", num_experts=NUM_EXPERTS, layer_ids=(LAYER_ID,), top_k=TOP_K,
        num_groups=NUM_GROUPS, groups_per_token=GROUPS_PER_TOKEN,
    )  # fmt: skip
    return Plan(
        model=model,
        topology=Topology(
            num_nodes=group.num_nodes,
            ranks_per_node=group.ranks_per_node,
            slots_per_rank=slots_per_rank,
        ),
        placement=Placement(
            phys_to_log_LS=slots_S[np.newaxis],
            layer_ids=(LAYER_ID,),
            num_experts=NUM_EXPERTS,
            split_weights_LS=weights_LS,
        ),
        split=split,
    )
