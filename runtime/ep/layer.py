"""The expert-parallel mixture-of-experts layer.

Router -> replica choice -> dispatch -> experts of the slots -> combine, over the processes of an
:class:`~eplb.runtime.ep.group.EPGroup`. No token is dropped: rows go by collectives of exact sizes,
or over peer memory with room for all tokens of all peers. Each forward is a collective of the whole
group, also for processes without tokens.
Shape letters: T tokens, H hidden size, K top-k, N received rows, P token-expert pairs, S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

import torch
import torch.distributed as dist
from torch import nn

from eplb.errors import InvalidInput
from eplb.runtime.ep.exchange import NO_FAULT, Crossing, Hop, Told, sort_by_slot
from eplb.runtime.ep.expert_slots import ExpertSlots
from eplb.runtime.ep.experts import Activation, compute_experts, gated_silu
from eplb.runtime.ep.group import EPGroup
from eplb.runtime.ep.payload import Payload
from eplb.runtime.ep.peer_buffers import PeerBuffers
from eplb.runtime.ep.rows import sum_rows
from eplb.runtime.ep.tables import PlacementTables, count_experts
from eplb.runtime.ep.words import Words

__all__ = ["EPMoELayer"]

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
    peers : PeerBuffers, optional
        Exchange over peer memory, within a node if ``by_node``, instead of by collectives. Layers
        that run one after the other share it.
    padded : bool
        Compute in buffers of the largest size, so that a forward waits for nothing on the host and
        can be captured in a CUDA graph: for decoding, with ``peers`` of one node and activations
        computed in BF16. What a forward raises and tells otherwise is raised and told where
        :attr:`word_min` is read.
    recorder : Recorder, optional
        Of :mod:`eplb.profiles.recorder`; it is shown every token's experts.

    Attributes
    ----------
    before_step : callable or None
        Called at the start of every forward, before anything is routed.
    after_dispatch : callable or None
        Called whenever the stream has been given a dispatch, ahead of the experts' computation.

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
        peers: PeerBuffers | None = None,
        padded: bool = False,
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
        if padded and (peers is None or by_node):
            raise InvalidInput(
                "padded sizes need peers=PeerBuffers(...) of one node; leave padded out where rows "
                "go between nodes"
            )
        self.slots, self.router = slots, router
        self.tables = tables.clone()
        self.layer_id = tables.layer_id
        self.payload = Payload(payload, hidden_size)
        if peers is not None:
            peers.check_layer(self.payload, self.tables, micro_batches)
        self.shared_expert, self.activation = shared_expert, activation
        self.micro_batches, self.recorder = micro_batches, recorder
        self.padded = padded
        self.before_step: Callable[[], None] | None = None
        self.after_dispatch: Callable[[], None] | None = None
        self._by_node = by_node
        self._enter(group, peers)

    def join(
        self, group: EPGroup, tables: PlacementTables, peers: PeerBuffers | None = None
    ) -> None:
        """Go on in another group, with the same slots. Exchanges are by node where it has such.

        Tables come to lie elsewhere, so graphs that were captured are void; sizes are exact.
        """
        self.tables = tables.clone()
        self.padded = False
        self._by_node = self._by_node and group.node_group is not None
        self._enter(group, peers)

    def _enter(self, group: EPGroup, peers: PeerBuffers | None) -> None:
        slots_per_rank = self.tables.slots_per_rank
        self.group, self._peers = group, peers
        self._first_slot = group.first_rank * slots_per_rank
        self._hops = _hops(group, slots_per_rank, by_node=self._by_node)
        self._words = Words(
            group, self.layer_id, peers, num_batches=self.micro_batches, padded=self.padded
        )

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
        self._words.mark_unsound(x_TH)
        parts = x_TH.chunk(2) if self.micro_batches == 2 and len(x_TH) > 1 else (x_TH,)
        # Every process sends equally many batches, be they empty.
        batches = [*parts, *[x_TH[:0]] * (self.micro_batches - len(parts))]
        told: list[Told] = []
        results = _interleave(
            [self._steps(batch, number, told) for number, batch in enumerate(batches)]
        )
        if not self.padded:
            self._words.hear(told)
        self._words.step += 1
        y_TH = results[0] if len(results) == 1 else torch.cat(results)
        return y_TH.to(x.dtype).view(x.shape)

    @property
    def word(self) -> int:
        """Sent to all processes with the counts of every forward from the next on."""
        return self._words.word

    @word.setter
    def word(self, word: int) -> None:
        self._words.word = word

    @property
    def word_min(self) -> int:
        """The minimum of all processes' words in the last forward.

        Raises
        ------
        ServingFailed
            Where padded, what :meth:`forward` raises otherwise.
        """
        return self._words.heard().words[0]

    @property
    def received_rows(self) -> list[int]:
        """Tokens that each rank of this process got in the last forward."""
        return self._words.heard().rows

    @property
    def received_pairs(self) -> list[int]:
        """Token-expert pairs that each rank of this process got in the last forward."""
        return self._words.heard().pairs

    @property
    def step(self) -> int:
        """Number of forwards so far."""
        return self._words.step

    def _steps(self, x_TH: torch.Tensor, number: int, told: list[Told]) -> Steps:
        """Run one batch; yields wherever something is under way that others can hide."""
        topk_TK, weight_TK = self.router(x_TH)
        if self.recorder is not None:
            self.recorder.observe(self.layer_id, topk_TK)  # type: ignore[attr-defined]
        if self.tables.split == "batch":
            yield from self._fit_batch(topk_TK, number)
        slot_TK = self.tables.choose_slots(topk_TK, self._turn(number))
        bytes_TB = self.payload.encode(x_TH)
        rows = bytes_TB, slot_TK, weight_TK.float(), self._words.sent
        y_TH = yield from self._cross(list(self._hops), rows, number, told, x_TH)
        return y_TH

    def _turn(self, number: int) -> int | torch.Tensor:
        """Return what tells apart whose turn a remainder is: a number of batches."""
        if self.padded:
            # A captured forward has no other number that changes.
            assert self._peers is not None
            return self._peers.mailboxes[number].epoch
        return self.step * self.micro_batches + number

    def _fit_batch(self, topk_TK: torch.Tensor, number: int) -> Generator[None, None, None]:
        """Fit the fractions of replicas to the tokens of all processes."""
        count_E = count_experts(topk_TK, self.tables.num_experts)
        if self._peers is not None and not self._by_node:
            self._peers.add_up(number, count_E)
        else:
            with self.group.watched(self._words.name("counts of experts")):
                work = dist.all_reduce(count_E, group=self.group.process_group, async_op=True)
                yield
                work.wait()
        self.tables.fit_batch(count_E)

    def _cross(
        self,
        hops: list[Hop],
        rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
        number: int,
        told: list[Told],
        x_TH: torch.Tensor | None,
    ) -> Steps:
        """Send rows through the hops that are left, have them computed, and add up what returns.

        ``x_TH`` is given in the first hop.
        """
        hop, *rest = hops
        if not rest and self._peers is not None:
            return (yield from self._cross_to_peers(hop, rows, number, told, x_TH))
        bytes_TB, slot_TK, weight_TK, words = rows
        crossing = Crossing(self.group, hop, f"layer {self.layer_id}, step {self.step}")
        crossing.count(slot_TK, weight_TK, words)
        yield
        crossing.learn()
        crossing.post(bytes_TB)
        if rest:
            words = torch.tensor(crossing.told.words, device=words.device)
        else:
            self._take(told, crossing.told)
        shared_TH = self._share(x_TH)
        yield
        received = crossing.receive()
        if rest:
            inner = received.bytes_NB, received.slot_NK, received.weight_NK, words
            sums_NH = yield from self._cross(rest, inner, number, told, None)
        else:
            bytes_PB, end_S, index_NK = sort_by_slot(
                received, self._first_slot, self.slots.num_slots
            )
            out_PH = self._compute(self.payload.decode(bytes_PB), end_S)
            sums_NH = sum_rows(out_PH, index_NK, received.weight_NK, self.payload.dtype)
        crossing.post_back(sums_NH)
        yield
        return self._add(crossing.finish, x_TH, shared_TH)

    def _cross_to_peers(
        self,
        hop: Hop,
        rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
        number: int,
        told: list[Told],
        x_TH: torch.Tensor | None,
    ) -> Steps:
        """Do the same over peer memory, where counts come with the rows."""
        assert self._peers is not None
        crossing = self._peers.crossing(
            number, self._words.told_at[number], hop.first_slot,
            beside=self.micro_batches > 1 or self.shared_expert is not None, padded=self.padded,
        )  # fmt: skip
        crossing.start(*rows)
        shared_TH = self._share(x_TH)
        yield
        if not self.padded:
            self._take(told, crossing.learn(self._words.name("counts")))
        pairs_PH, end_S = crossing.pairs()
        crossing.give_back(self._compute(pairs_PH, end_S))
        yield
        return self._add(crossing.finish, x_TH, shared_TH)

    def _take(self, told: list[Told], one: Told) -> None:
        """Keep what a batch's counts say; a fault ends the forward, on every process."""
        told.append(one)
        if one.words[1] != NO_FAULT:
            self._words.hear(told)

    def _share(self, x_TH: torch.Tensor | None) -> torch.Tensor | None:
        if x_TH is None or self.shared_expert is None:
            return None
        return self.shared_expert(x_TH)

    def _compute(self, x_PH: torch.Tensor, end_S: torch.Tensor) -> torch.Tensor:
        if self.after_dispatch is not None:
            self.after_dispatch()
        return compute_experts(x_PH, end_S, self.slots, self.activation)

    def _add(
        self,
        finish: Callable[[torch.dtype], torch.Tensor],
        x_TH: torch.Tensor | None,
        shared_TH: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the sum of what came back, and of the shared expert's output."""
        if x_TH is None:
            return finish(self.payload.dtype)
        if shared_TH is None:
            return finish(x_TH.dtype)
        return finish(torch.float32) + shared_TH


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
