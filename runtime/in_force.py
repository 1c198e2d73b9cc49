"""Which placement serves, also while a swap has changed some layers and not yet the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from eplb.arrays import FloatArray, IntArray
from eplb.plan import Plan, content_digest
from eplb.slots import replica_count

__all__ = ["InForce"]


@dataclass(frozen=True, slots=True, eq=False)
class InForce:
    """One plan, or two of which some layers are in force each.

    Parameters
    ----------
    old, new : Plan
        The same where all layers are of one.
    layers : tuple of int
        Rows of the placement that are those of ``new``.
    digest : str
        Equal where the same is in force.
    old_digest, new_digest : str
    """

    old: Plan
    new: Plan
    layers: tuple[int, ...]
    digest: str
    old_digest: str
    new_digest: str

    @classmethod
    def of(cls, plan: Plan, digest: str) -> InForce:
        """Return that one plan is in force."""
        return cls(plan, plan, (), digest, digest, digest)

    @property
    def is_mixed(self) -> bool:
        """Whether there are layers of two plans."""
        return bool(self.layers)

    def switched(self, new: Plan, new_digest: str, layers: Sequence[int]) -> InForce:
        """Return what is in force when these layers have changed over as well.

        The digest of what is mixed is made of both plans', which are large; so a step that changes
        layers over does not wait for theirs.
        """
        return self._with(new, new_digest, {*self.layers, *layers})

    def returned(self, layers: Sequence[int]) -> InForce:
        """Return what is in force when these layers have gone back to the old plan."""
        return self._with(self.new, self.new_digest, set(self.layers) - set(layers))

    def _with(self, new: Plan, new_digest: str, layers: set[int]) -> InForce:
        if not layers:
            return InForce.of(self.old, self.old_digest)
        rows = tuple(sorted(layers))
        digest = new_digest
        if len(rows) < new.placement.num_layers:
            digest = content_digest(
                {"old": self.old_digest, "new": new_digest, "layers": list(rows)}
            )
        return InForce(self.old, new, rows, digest, self.old_digest, new_digest)

    def slots_LS(self) -> IntArray:
        """Return the logical expert in each slot, [L, S]."""
        slots = self.old.placement.phys_to_log_LS.copy()
        slots[list(self.layers)] = self.new.placement.phys_to_log_LS[list(self.layers)]
        return slots

    def plan(self) -> Plan:
        """Return it as one plan. Layers of two split rules go by the new one's."""
        if not self.is_mixed:
            return self.old
        if len(self.layers) == self.new.placement.num_layers:
            return self.new
        slots_LS = self.slots_LS()
        weights_LS: FloatArray | None = None
        if self.new.split == "weighted":
            weights_LS = _even_weights(slots_LS, self.new.model.num_experts)
            for plan, rows in ((self.old, self._rest()), (self.new, self.layers)):
                if plan.placement.split_weights_LS is not None:
                    weights_LS[list(rows)] = plan.placement.split_weights_LS[list(rows)]
        placement = replace(
            self.new.placement, phys_to_log_LS=slots_LS, split_weights_LS=weights_LS
        )
        return replace(self.new, placement=placement, quality=None, provenance={"solver": "mixed"})

    def _rest(self) -> list[int]:
        return sorted(set(range(self.new.placement.num_layers)) - set(self.layers))


def _even_weights(slots_LS: IntArray, num_experts: int) -> FloatArray:
    """Return equal fractions for all replicas of each expert."""
    count_LE = replica_count(slots_LS, num_experts)
    rows = np.arange(len(slots_LS))[:, np.newaxis]
    weights: FloatArray = np.where(slots_LS >= 0, 1.0 / count_LE[rows, slots_LS], 0.0)
    return weights
