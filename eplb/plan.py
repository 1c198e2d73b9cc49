"""A plan: a placement with the model and topology it is for, what it is worth, and its origin.

The YAML file it lives in is read and written by :mod:`eplb.plan_file`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from eplb.errors import InvalidInput, PlacementInvalid, unknown_name
from eplb.model import MoEModel
from eplb.problem import OBJECTIVES
from eplb.slots import Placement
from eplb.split import check_split
from eplb.topology import Topology

__all__ = ["PLAN_SCHEMA", "Plan", "Quality"]

PLAN_SCHEMA = "eplb/plan@1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """What a plan is worth on the profile it was fitted to.

    Parameters
    ----------
    imbalance_mean, imbalance_worst : float
        As in :class:`eplb.metrics.Balance`.
    bound_mean : float
        No placement on these slots has a lower ``imbalance_mean``.
    gap_mean : float
        (imbalance_mean - bound_mean) / bound_mean.
    objective, bound, gap : float, optional
        The same three for the statistic that was minimised, where that is not the mean.
    """

    imbalance_mean: float
    imbalance_worst: float
    bound_mean: float
    gap_mean: float
    objective: float | None = None
    bound: float | None = None
    gap: float | None = None

    def to_dict(self) -> dict[str, float]:
        """Return the figures there are."""
        return {
            name: value
            for name in self.__dataclass_fields__
            if (value := getattr(self, name)) is not None
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What an engine loads, and what says whether it should.

    Parameters
    ----------
    model : MoEModel
        ``layer_ids`` are those of the placement.
    topology : Topology
    placement : Placement
    split : str
        The split rule the placement was solved for.
    statistic : str
        The statistic over windows that was minimised.
    quality : Quality, optional
        Absent in plans written by hand or by another program.
    provenance : mapping
        Solver, seed, digest of the profile, versions; JSON values.

    Raises
    ------
    InvalidInput, PlacementInvalid
        The parts do not fit each other.
    """

    model: MoEModel
    topology: Topology
    placement: Placement
    split: str = "even"
    statistic: str = "mean"
    quality: Quality | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    _digest: str | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.placement.num_slots != self.topology.num_slots:
            raise PlacementInvalid(
                f"layers have {self.placement.num_slots} slots and the topology "
                f"{self.topology.num_slots} ({self.topology.num_ranks} ranks x "
                f"{self.topology.slots_per_rank}); they must agree"
            )
        if self.placement.num_experts != self.model.num_experts:
            raise InvalidInput(
                f"the placement has {self.placement.num_experts} experts and the model "
                f"{self.model.name} {self.model.num_experts}; they must agree"
            )
        if self.placement.layer_ids != self.model.layer_ids:
            raise InvalidInput("the placement and its model must name the same layers")
        self._check_padding()
        check_split(self.split, self.placement.split_weights_LS)
        if self.split != "weighted" and self.placement.split_weights_LS is not None:
            raise InvalidInput(f"split {self.split} takes no split_weights; remove them")
        if self.statistic not in OBJECTIVES:
            raise unknown_name("objective", self.statistic, OBJECTIVES)

    def _check_padding(self) -> None:
        if self.topology.is_uniform:
            return
        astray_LS = (self.placement.phys_to_log_LS >= 0) & ~self.topology.has_slot_RK.reshape(-1)
        if astray_LS.any():
            layer, slot = (int(i) for i in np.argwhere(astray_LS)[0])
            rank = slot // self.topology.slots_per_rank
            out = rank in self.topology.ranks_out_of_service
            raise PlacementInvalid(
                f"layer {self.placement.layer_ids[layer]}, slot {slot} holds an expert and rank "
                f"{rank} {'is out of service' if out else 'has fewer slots'}; it must be -1 (eplb "
                "repair moves what dead ranks held)"
            )

    def content(self) -> dict[str, Any]:
        """Return what the plan decides, as the JSON values that its digest covers."""
        model = {
            name: value
            for name in (
                "name", "revision", "num_layers", "num_experts", "top_k", "num_groups",
                "groups_per_token", "hidden_size", "expert_bytes", "num_shared_experts",
            )
            if (value := getattr(self.model, name)) is not None
        }  # fmt: skip
        topology = {
            name: list(value) if isinstance(value, tuple) else value
            for name in self.topology.__dataclass_fields__
            if (value := getattr(self.topology, name)) not in (None, ())
        }
        placement = self.placement
        content = {
            "schema": PLAN_SCHEMA,
            "model": model,
            "topology": topology,
            "split": self.split,
            "objective": {"statistic": self.statistic},
            "layers": dict(
                zip(placement.layer_ids, placement.phys_to_log_LS.tolist(), strict=True)
            ),
        }
        if placement.split_weights_LS is not None:
            content["split_weights"] = dict(
                zip(placement.layer_ids, placement.split_weights_LS.tolist(), strict=True)
            )
        return content

    def digest(self) -> str:
        """Return ``sha256:`` and the digest that ranks agree on before they load the plan."""
        if self._digest is None:
            # Parts are read-only: worked out once.
            object.__setattr__(self, "_digest", content_digest(self.content()))
        assert self._digest is not None
        return self._digest


def content_digest(content: Mapping[str, Any]) -> str:
    """Digest JSON values: keys sorted (layer ids as numbers), no spaces, ASCII, SHA-256."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return "sha256:" + hashlib.sha256(text.encode("ascii")).hexdigest()
