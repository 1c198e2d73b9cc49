"""Plans and routings for ``ep_layer.py``: solved and drawn once, kept in an npz file.

Two recordings. ``deepseek_v3``: totals of DeepSeek-V3 by expert; planned on prefill, run on decode,
each token drawing 8 distinct experts with the recorded frequencies (choices of one token are
otherwise independent). ``moe_lm_256``: planned on the first half of a drifting stream, run on the
real choices of tokens of all its domains.
Shape letters: L layers, E logical experts, S slots, T tokens, K top-k, C plans.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import eplb
from eplb.load_profile import LoadProfile, merge_profiles
from eplb.model import MoEModel
from eplb.placement.solve import Effort, solve
from eplb.plan import Plan
from eplb.problem import Problem
from eplb.profiles import read_profile
from eplb.replicas import choose_slots, replica_bounds, source_share, token_offset
from eplb.runtime.ep.group import EPGroup
from eplb.slots import Placement, initial_placement
from eplb.topology import Topology

__all__ = ["NUM_EXPERTS", "NUM_RANKS", "SLOTS_PER_RANK", "TOP_K", "Inputs", "Variant", "prepare"]

NUM_EXPERTS, TOP_K = 256, 8
NUM_RANKS, SLOTS_PER_RANK = 4, 66
NUM_LAYERS = 8
TOKENS = 4 * 8192
SECONDS = 10.0
TOPOLOGY = Topology(num_nodes=1, ranks_per_node=NUM_RANKS, slots_per_rank=SLOTS_PER_RANK)
SPLITS = ("even", "nearest", "weighted", "batch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One row of the benchmark: a plan, its rule, what is routed, and options of the layer."""

    name: str
    plan: Plan
    split: str
    routing: str = "recorded"
    payload: str = "bf16"
    micro_batches: int = 1
    # Over peer memory or by collectives; two halves one after the other; in a CUDA graph.
    peers: bool = True
    halves: bool = False
    captured: bool = False


def prepare(data: Path, output: Path) -> None:
    """Solve the plans and draw the routings of both recordings."""
    arrays: dict[str, Any] = {}
    random = np.random.default_rng(0)
    totals = f"{data}/deepseek_v3_sglang/logical_count.npz"
    fitted = merge_profiles(
        [read_profile(f"{totals}:{name}") for name in
         ("prefill_in1000out1000", "prefill_in1024", "prefill_in2048", "prefill_in4096")]
    )  # fmt: skip
    run_on = read_profile(f"{totals}:decode_in1000out1000")
    chosen = np.linspace(0, run_on.num_layers - 1, NUM_LAYERS).astype(int)
    routed = np.stack([_draw(run_on.counts_WLE[0, layer], random) for layer in chosen])
    _add(arrays, "deepseek_v3", fitted, chosen, routed)
    stream = read_profile(f"{data}/moe_lm_256/drift_a.npz").windows(0, 240)
    with np.load(f"{data}/moe_lm_256/tokens.npz") as file:
        domains = [file[name] for name in file.files if file[name].ndim == 3]
    tokens_TLK = np.concatenate(domains)
    tokens_TLK = tokens_TLK[random.choice(len(tokens_TLK), TOKENS, replace=False)]
    _add(arrays, "moe_lm_256", stream, np.arange(8), tokens_TLK.transpose(1, 0, 2))
    np.savez_compressed(output, **arrays)


def _add(
    arrays: dict[str, Any],
    name: str,
    fitted: LoadProfile,
    layers: NDArray[np.integer[Any]],
    routed_LTK: NDArray[np.integer[Any]],
) -> None:
    ids = [fitted.layer_ids[layer] for layer in layers]
    profile = _layers(fitted, layers)
    arrays[f"{name}/layer_ids"] = np.array(ids)
    arrays[f"{name}/recorded"] = routed_LTK.astype(np.uint8)
    random = np.random.default_rng(1)
    even = [_draw(np.ones(NUM_EXPERTS), random) for _ in layers]
    arrays[f"{name}/uniform"] = np.stack(even).astype(np.uint8)
    for plan, split, slots_LS, weights_LS in _plans(profile):
        arrays[f"{name}/plan/{plan}/{split}"] = slots_LS.astype(np.int16)
        if weights_LS is not None:
            arrays[f"{name}/weights/{plan}/{split}"] = weights_LS


def _layers(profile: LoadProfile, layers: NDArray[np.integer[Any]]) -> LoadProfile:
    return LoadProfile(
        counts_WLE=profile.counts_WLE[:, layers],
        layer_ids=tuple(profile.layer_ids[layer] for layer in layers),
        scenario_W=profile.scenario_W,
        phase_W=profile.phase_W,
        source=profile.source,
    )


def _plans(profile: LoadProfile) -> list[tuple[str, str, NDArray[Any], NDArray[Any] | None]]:
    num_slots = NUM_RANKS * SLOTS_PER_RANK
    linear = initial_placement(profile.layer_ids, NUM_EXPERTS, NUM_EXPERTS).phys_to_log_LS
    padded = np.pad(
        linear.reshape(-1, NUM_RANKS, NUM_EXPERTS // NUM_RANKS),
        ((0, 0), (0, 0), (0, SLOTS_PER_RANK - NUM_EXPERTS // NUM_RANKS)), constant_values=-1,
    ).reshape(len(linear), num_slots)  # fmt: skip
    theirs, _, _ = eplb.rebalance_experts(profile.counts_WLE.sum(0), num_slots, 8, 1, NUM_RANKS)
    found: list[tuple[str, str, NDArray[Any], NDArray[Any] | None]] = [
        ("no replicas", "even", padded, None),
        ("DeepSeek", "even", np.asarray(theirs), None),
    ]
    model = _model(profile.layer_ids)
    for split in SPLITS:
        problem = Problem(profile=profile, model=model, topology=TOPOLOGY, split=split)
        # Four ranks and eight replicas: pouring balances what greedy places.
        solver = "greedy" if split == "batch" else "search"
        placement = solve(problem, solver, Effort(time_limit_s=SECONDS)).placement
        found.append(("eplb", split, placement.phys_to_log_LS, placement.split_weights_LS))
    return found


def _model(layer_ids: tuple[int, ...]) -> MoEModel:
    return MoEModel(
        name="measured", num_experts=NUM_EXPERTS, layer_ids=layer_ids, top_k=TOP_K, num_groups=8,
        groups_per_token=4,
    )  # fmt: skip


def _draw(count_E: NDArray[Any], random: np.random.Generator) -> NDArray[np.int64]:
    """Draw 8 distinct experts for each token, each with its recorded frequency, shape [T, K].

    Systematic sampling (W. G. Madow, Annals of Mathematical Statistics 20, 1949): eight points at
    distance one on the frequencies laid end to end, in a new order for every token.
    """
    part_E = np.minimum(TOP_K * count_E / count_E.sum(), 1.0)
    order_TE = np.argsort(random.random((TOKENS, NUM_EXPERTS)), axis=1)
    end_TE = np.cumsum(part_E[order_TE], axis=1)
    end_TE *= TOP_K / end_TE[:, -1:]
    point_TK = random.random((TOKENS, 1)) + np.arange(TOP_K)
    place_TK = np.stack([(end_TE < point_TK[:, k : k + 1]).sum(1) for k in range(TOP_K)], axis=1)
    drawn: NDArray[np.int64] = np.take_along_axis(
        order_TE, np.minimum(place_TK, NUM_EXPERTS - 1), axis=1
    )
    return drawn


class Inputs:
    """What was prepared of one recording."""

    def __init__(self, file: Any, name: str) -> None:
        self._file, self._name = file, name
        self.layer_ids = tuple(file[f"{name}/layer_ids"].tolist())
        self._routed = {
            "recorded": file[f"{name}/recorded"],
            "uniform": file[f"{name}/uniform"],
        }

    def variants(self, phase: str) -> list[Variant]:
        """Return the rows of the benchmark; the first is the ceiling."""
        linear = self._plan("no replicas", "even")
        even = partial(Variant, plan=linear, split="even", routing="uniform")
        batch = partial(Variant, plan=self._plan("eplb", "batch"), split="batch")
        captured = [
            even(name="even router, captured", captured=True),
            batch(name="eplb, batch, captured", captured=True),
        ]
        return [
            even(name="even router"),
            Variant(name="no replicas", plan=linear, split="even"),
            Variant(name="DeepSeek, even", plan=self._plan("DeepSeek", "even"), split="even"),
            *[
                Variant(name=f"eplb, {split}", plan=self._plan("eplb", split), split=split)
                for split in SPLITS
            ],
            batch(name="eplb, batch, FP8", payload="fp8"),
            even(name="even router, FP8", payload="fp8"),
            even(name="even router, collectives", peers=False),
            batch(name="eplb, batch, collectives", peers=False),
            *[
                made(name=f"{name}, {how}", **options)
                for name, made in (("even router", even), ("eplb, batch", batch))
                for how, options in (
                    ("overlap", {"micro_batches": 2}), ("halves in turn", {"halves": True}),
                )
            ],
            *(captured if phase == "decode" else []),
        ]  # fmt: skip

    def routing(
        self, name: str, layer: int, tokens: int, group: EPGroup
    ) -> NDArray[np.integer[Any]]:
        """Return the experts of the tokens of this process' ranks, shape [T, K]."""
        first = group.first_rank * tokens
        found: NDArray[np.integer[Any]] = self._routed[name][layer][
            first : first + tokens * group.ranks_per_process
        ]
        return found

    def slot_rows(self, variant: Variant, layer: int, layer_id: int, tokens: int) -> NDArray[Any]:
        """Return the rows that each slot receives, shape [S]; from the rule's shared function.

        Under ``batch`` the fractions are those of the torch layer's tables.
        """
        slots_S = variant.plan.placement.phys_to_log_LS[layer]
        rows_S = np.zeros(len(slots_S), dtype=np.int64)
        routed_TK = self._routed[variant.routing][layer][: tokens * NUM_RANKS].astype(np.int64)
        weights_LS = variant.plan.placement.split_weights_LS
        for rank in range(NUM_RANKS):
            if variant.split == "batch":
                bounds = _batch_bounds(slots_S, routed_TK)
            else:
                share_S = source_share(
                    slots_S, NUM_EXPERTS, TOPOLOGY, variant.split, rank,
                    None if weights_LS is None else weights_LS[layer],
                )  # fmt: skip
                bounds = replica_bounds(slots_S, share_S)
            slot_TK = choose_slots(
                routed_TK[rank * tokens : (rank + 1) * tokens], bounds,
                token_offset(rank, layer_id, NUM_EXPERTS),
            )  # fmt: skip
            rows_S += np.bincount(slot_TK.ravel(), minlength=len(slots_S))
        return rows_S

    def _plan(self, plan: str, split: str) -> Plan:
        weights = f"{self._name}/weights/{plan}/{split}"
        return Plan(
            model=_model(self.layer_ids),
            topology=TOPOLOGY,
            placement=Placement(
                phys_to_log_LS=self._file[f"{self._name}/plan/{plan}/{split}"],
                layer_ids=self.layer_ids,
                num_experts=NUM_EXPERTS,
                split_weights_LS=self._file[weights] if weights in self._file.files else None,
            ),
            split=split,
        )


def _batch_bounds(slots_S: NDArray[Any], routed_TK: NDArray[Any]) -> Any:
    """Return the bounds that the layer finds for a batch."""
    import torch  # noqa: PLC0415

    from eplb.replicas import UNIT_BITS, ReplicaBounds  # noqa: PLC0415
    from eplb.runtime.ep.batch_split import (  # noqa: PLC0415
        BatchPhases,
        begin_of_replicas,
        first_on_rank,
    )

    used_S = first_on_rank(slots_S, NUM_EXPERTS, SLOTS_PER_RANK).astype(np.float64)
    bounds = replica_bounds(slots_S, used_S)
    phases = BatchPhases.of_slots(
        slots_S, bounds.slot_X, NUM_EXPERTS, SLOTS_PER_RANK, torch.device("cpu")
    )
    count_E = torch.from_numpy(np.bincount(routed_TK.ravel(), minlength=NUM_EXPERTS))
    begin_FMX = begin_of_replicas(phases, count_E)
    bound_X = (slots_S[bounds.slot_X] << UNIT_BITS).copy()
    there = phases.place_FMX >= 0
    bound_X[phases.place_FMX[there].numpy()] += begin_FMX[there].numpy()
    return ReplicaBounds(bound_X, bounds.slot_X)
