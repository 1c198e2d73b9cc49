"""The expert-parallel mixture-of-experts layer.

Router -> replica choice -> dispatch -> experts of the slots -> combine, over the processes of an
:class:`~eplb.runtime.ep.group.EPGroup`. No token is dropped and no buffer has a capacity: sizes are
exchanged first. Each forward is a collective of the whole group, also for processes without tokens.
Shape letters: T tokens, H hidden size, K top-k, N received rows, P token-expert pairs, S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

import torch
import torch.distributed as dist
from torch import nn

from eplb.errors import InvalidInput, ServingFailed
from eplb.runtime.ep.exchange import Crossing, Hop, Received
from eplb.runtime.ep.expert_slots import ExpertSlots
from eplb.runtime.ep.experts import Activation, compute_experts, gated_silu
from eplb.runtime.ep.group import EPGroup
from eplb.runtime.ep.payload import Payload
from eplb.runtime.ep.rows import gather_rows, sum_rows
from eplb.runtime.ep.tables import PlacementTables

__all__ = ["EPMoELayer"]

# A process without a fault says this.
_NO_FAULT = torch.iinfo(torch.int64).max

Steps = Generator[None, None, torch.Tensor]


class EPMoELayer(nn.Module):
    """A mixture-of-experts layer whose experts lie in slots of many ranks.

    Parameters
    ----------
    group : EPGroup
    tables : PlacementTables
        The placement to begin with. The layer keeps a copy at a fixed address.
    slots : ExpertSlots
        Of all ranks of this process, loaded with the experts that the placement puts there.
    router : callable
        From activations [T, H] to expert ids int [T, K] (below 0: none) and weights [T, K].
    hidden_size : int
    payload : str
        What activations travel as: ``bf16``, ``fp8`` (dispatch only; results are BF16) or ``fp32``.
    shared_expert : callable, optional
        What every token goes through besides, [T, H] to [T, H]; it runs while tokens travel.
    activation : callable
        See :func:`~eplb.runtime.ep.experts.compute_experts`.
    by_node : bool
        Cross to nodes first and from there to ranks, so that a token crosses to a node once. The
        group must have been made with ``nodes=True``.
    micro_batches : int
        1, or 2: the tokens in two halves, one half's exchanges under the other's computation.
    recorder : Recorder, optional
        Of :mod:`eplb.profiles.recorder`; it is shown every token's experts.

    Attributes
    ----------
    word : int
        Sent to all processes with the counts of every forward.
    word_min : int
        The minimum of all processes' words in the last forward.
    before_step : callable or None
        Called at the start of every forward, before anything is routed.
    after_dispatch : callable or None
        Called whenever the stream has been given a dispatch, ahead of the experts' computation.
    step : int
        Number of forwards so far.
    received_rows, received_pairs : list of int
        Of the last forward, for each rank of this process.

    Raises
    ------
    InvalidInput
        Slots, tables, group and options do not fit each other.
    """

    def __init__(
        self,
        group: EPGroup,
        tables: PlacementTables,
        slots: ExpertSlots,
        router: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
        *,
        hidden_size: int,
        payload: str = "bf16",
        shared_expert: Callable[[torch.Tensor], torch.Tensor] | None = None,
        activation: Activation = gated_silu,
        by_node: bool = False,
        micro_batches: int = 1,
        recorder: object | None = None,
    ) -> None:
        super().__init__()
        own_slots = group.ranks_per_process * tables.slots_per_rank
        if slots.num_slots != own_slots:
            raise InvalidInput(
                f"this process holds {group.ranks_per_process} ranks x {tables.slots_per_rank} "
                f"slots, and its ExpertSlots {slots.num_slots}; make it {own_slots}"
            )
        if micro_batches not in {1, 2}:
            raise InvalidInput(f"micro_batches must be 1 or 2, got {micro_batches}")
        self.group, self.slots, self.router = group, slots, router
        self.tables = tables.clone()
        self.layer_id = tables.layer_id
        self.payload = Payload(payload, hidden_size)
        self.shared_expert, self.activation = shared_expert, activation
        self.micro_batches, self.recorder = micro_batches, recorder
        self.word = self.word_min = 0
        self.before_step: Callable[[], None] | None = None
        self.after_dispatch: Callable[[], None] | None = None
        self.step = 0
        self.received_rows = self.received_pairs = [0] * group.ranks_per_process
        self._by_node = by_node
        self._first_slot = group.first_rank * tables.slots_per_rank
        self._hops = _hops(group, tables.slots_per_rank, by_node=by_node)

    def join(self, group: EPGroup, tables: PlacementTables) -> None:
        """Go on in another group, with the same slots. Exchanges are by node where it has such.

        Tables come to lie elsewhere, so graphs that were captured are void.
        """
        by_node = self._by_node and group.node_group is not None
        self.group, self.tables = group, tables.clone()
        self.word = self.word_min = 0
        self._first_slot = group.first_rank * tables.slots_per_rank
        self._hops = _hops(group, tables.slots_per_rank, by_node=by_node)

    def install(self, tables: PlacementTables) -> None:
        """Put another placement in force from the next forward on; its rows must be in the slots.

        Raises
        ------
        InvalidInput
            The tables are of another layer or shape.
        """
        self.tables.install(tables)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output, in the shape and type of ``x`` [..., H].

        Raises
        ------
        ServingFailed
            A peer did not come in time, or activations of some process are not finite; the latter
            is raised by all processes, and the next forward may go on.
        """
        if self.before_step is not None:
            self.before_step()
        x_TH = x.reshape(-1, x.shape[-1])
        words = self._words(x_TH)
        parts = x_TH.chunk(2) if self.micro_batches == 2 and len(x_TH) > 1 else (x_TH,)
        # Every process sends equally many batches, be they empty.
        batches = [*parts, *[x_TH[:0]] * (self.micro_batches - len(parts))]
        self._seen_rows: list[list[int]] = []
        self._seen_pairs: list[list[int]] = []
        self._seen_words: list[int] = []
        results = _interleave(
            [self._steps(batch, words, number) for number, batch in enumerate(batches)]
        )
        self.word_min = min(self._seen_words)
        self.received_rows = [sum(rows) for rows in zip(*self._seen_rows, strict=True)]
        self.received_pairs = [sum(pairs) for pairs in zip(*self._seen_pairs, strict=True)]
        self.step += 1
        y_TH = results[0] if len(results) == 1 else torch.cat(results)
        return y_TH.to(x.dtype).view(x.shape)

    def _words(self, x_TH: torch.Tensor) -> torch.Tensor:
        """Return the word, and this process' number if it has numbers that are none."""
        sound = torch.isfinite(x_TH.sum(dtype=torch.float32))
        fault = torch.where(sound, _NO_FAULT, self.group.process)
        return torch.stack([torch.full_like(fault, self.word), fault])

    def _steps(self, x_TH: torch.Tensor, words: torch.Tensor, number: int) -> Steps:
        """Run one batch; yields wherever something is under way that others can hide."""
        topk_TK, weight_TK = self.router(x_TH)
        if self.recorder is not None:
            self.recorder.observe(self.layer_id, topk_TK)  # type: ignore[attr-defined]
        if self.tables.split == "batch":
            yield from self._fit_batch(topk_TK)
        slot_TK = self.tables.choose_slots(topk_TK, self.step * self.micro_batches + number)
        bytes_TB = self.payload.encode(x_TH)
        y_TH = yield from self._cross(
            list(self._hops), bytes_TB, slot_TK, weight_TK.float(), words, x_TH
        )
        return y_TH

    def _fit_batch(self, topk_TK: torch.Tensor) -> Generator[None, None, None]:
        """Fit the fractions of replicas to the tokens of all processes."""
        num_experts = self.tables.num_experts
        key_P = torch.where(topk_TK < 0, num_experts, topk_TK).flatten().long()
        count_E = torch.zeros(num_experts + 1, dtype=torch.int64, device=key_P.device)
        count_E = count_E.scatter_add_(0, key_P, torch.ones_like(key_P))[:-1]
        with self.group.watched(f"counts of experts of layer {self.layer_id}, step {self.step}"):
            work = dist.all_reduce(count_E, group=self.group.process_group, async_op=True)
            yield
            work.wait()
        self.tables.fit_batch(count_E)

    def _cross(
        self,
        hops: list[Hop],
        bytes_TB: torch.Tensor,
        slot_TK: torch.Tensor,
        weight_TK: torch.Tensor,
        words: torch.Tensor,
        x_TH: torch.Tensor | None,
    ) -> Steps:
        """Send rows through the hops that are left, have them computed, and add up what returns."""
        hop, *rest = hops
        crossing = Crossing(self.group, hop, f"layer {self.layer_id}, step {self.step}")
        crossing.count(slot_TK, weight_TK, words)
        yield
        crossing.learn()
        crossing.post(bytes_TB)
        if rest:
            words = torch.tensor(crossing.words, device=words.device)
        else:
            self._learn(crossing)
        shared_TH = None
        if x_TH is not None and self.shared_expert is not None:
            shared_TH = self.shared_expert(x_TH)
        yield
        received = crossing.receive()
        if rest:
            sums_NH = yield from self._cross(
                rest, received.bytes_NB, received.slot_NK, received.weight_NK, words, None
            )
        else:
            if self.after_dispatch is not None:
                self.after_dispatch()
            sums_NH = self._compute(received)
        crossing.post_back(sums_NH)
        yield
        if x_TH is None:
            return crossing.finish(self.payload.dtype)
        if shared_TH is None:
            return crossing.finish(x_TH.dtype)
        return crossing.finish(torch.float32) + shared_TH

    def _learn(self, crossing: Crossing) -> None:
        """Note what the counts say; the same on every process."""
        word_min, fault = crossing.words
        self._seen_words.append(word_min)
        self._seen_rows.append([sum(rows) for rows in zip(*crossing.rows_CP, strict=True)])
        self._seen_pairs.append([sum(pairs) for pairs in zip(*crossing.pairs_CP, strict=True)])
        if fault != _NO_FAULT:
            raise ServingFailed(
                f"layer {self.layer_id}, step {self.step}: activations on process {fault} are not "
                "finite (NaN or infinite); look for the cause in the layers before this one"
            )

    def _compute(self, received: Received) -> torch.Tensor:
        """Return for each row the weighted sum of its experts' outputs, [N, H]."""
        slot_NK = received.slot_NK
        num_rows, top_k = slot_NK.shape
        dtype = self.payload.dtype
        none = self.slots.num_slots
        local_NK = torch.where(slot_NK >= 0, slot_NK - self._first_slot, none)
        # Few bits are sorted fast.
        small = torch.int16 if none < 1 << 15 else torch.int32
        sorted_P, order_P = torch.sort(local_NK.flatten().to(small), stable=True)
        place_NK = torch.empty_like(order_P).scatter_(
            0, order_P, torch.arange(len(order_P), device=order_P.device)
        )
        index_NK = torch.where(slot_NK >= 0, place_NK.view(num_rows, top_k), -1)
        num_pairs = received.num_pairs
        bytes_PB = received.bytes_NB.new_empty(num_pairs, received.bytes_NB.shape[1])
        gather_rows(received.bytes_NB, order_P[:num_pairs] // top_k, bytes_PB)
        out_PH = compute_experts(
            self.payload.decode(bytes_PB), sorted_P[:num_pairs].int(), self.slots, self.activation
        )
        return sum_rows(out_PH, index_NK, received.weight_NK, dtype)


def _hops(group: EPGroup, slots_per_rank: int, *, by_node: bool) -> tuple[Hop, ...]:
    if not by_node:
        return (Hop(group.process_group, 0, slots_per_rank, group.num_ranks),)
    if group.rail_group is None or group.node_group is None:
        raise InvalidInput("by_node needs an EPGroup that was made with nodes=True")
    slots_per_node = slots_per_rank * group.ranks_per_node
    return (
        Hop(group.rail_group, 0, slots_per_node, group.num_nodes),
        Hop(group.node_group, group.node * slots_per_node, slots_per_rank, group.ranks_per_node),
    )


def _interleave(batches: list[Steps]) -> list[torch.Tensor]:
    """Run generators in turns until all have returned, and return what they did."""
    results: dict[int, torch.Tensor] = {}
    while len(results) < len(batches):
        for number, batch in enumerate(batches):
            if number not in results:
                try:
                    next(batch)
                except StopIteration as end:
                    results[number] = end.value
    return [results[number] for number in range(len(batches))]
