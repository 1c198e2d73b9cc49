"""What processes tell each other beside their tokens: a word, faults, and how much each one gets.

Shape letters: T tokens, H hidden size.
"""

from __future__ import annotations

import torch

from eplb.errors import ServingFailed
from eplb.runtime.ep.exchange import NO_FAULT, Told
from eplb.runtime.ep.group import EPGroup
from eplb.runtime.ep.peer_buffers import PeerBuffers

__all__ = ["Words"]


class Words:
    """What one layer of this process says with every forward, and what it heard in the last.

    Parameters
    ----------
    group : EPGroup
    layer_id : int
        Absolute decoder layer id.
    peers : PeerBuffers, optional
        Through which counts come, instead of by a collective.
    num_batches : int
        Of a forward.
    padded : bool
        The host does not wait for counts in a forward; they are read where they are asked for.

    Attributes
    ----------
    sent : Tensor of int64, shape [2]
        On the device: the word, and this process' number if its activations are not finite.
    told_at : list of Tensor of int64
        Over peer memory: where the counts of each batch arrive, on the host.
    step : int
        Number of forwards so far.
    """

    def __init__(
        self,
        group: EPGroup,
        layer_id: int,
        peers: PeerBuffers | None,
        *,
        num_batches: int,
        padded: bool,
    ) -> None:
        self._group, self._layer_id, self._peers, self._padded = group, layer_id, peers, padded
        self.sent = torch.tensor([0, NO_FAULT], device=group.device)
        self.told_at = [] if peers is None else [peers.new_told() for _ in range(num_batches)]
        self.step = 0
        self._word = 0
        nothing = [0] * group.ranks_per_process
        self._heard = Told((0, NO_FAULT), nothing, nothing)

    @property
    def word(self) -> int:
        """What is sent from the next forward on."""
        return self._word

    @word.setter
    def word(self, word: int) -> None:
        if word != self._word:
            self._word = word
            # On the stream, behind the forwards launched before.
            self.sent[0].fill_(word)

    def mark_unsound(self, x_TH: torch.Tensor) -> None:
        """Say with the next forward whether these activations are finite; waits for nothing."""
        process = self._group.process
        if x_TH.is_cuda:
            from eplb.runtime.ep import kernels  # noqa: PLC0415  (Triton is there with GPUs only)

            self.sent[1].fill_(NO_FAULT)
            kernels.mark_unsound(x_TH.contiguous(), self.sent[1:], process)
        else:
            sound = torch.isfinite(x_TH.sum(dtype=torch.float32))
            self.sent[1] = torch.where(sound, NO_FAULT, process)

    def heard(self) -> Told:
        """Return what all said in the last forward; where padded, also in one replayed by a graph.

        Raises
        ------
        ServingFailed
            Activations of a process are not finite, or a peer stayed away.
        """
        if self._padded:
            assert self._peers is not None
            self.hear(self._peers.read_told(self.told_at, self.name("counts")))
        return self._heard

    def hear(self, told: list[Told]) -> None:
        """Take in what the counts of a forward's batches say; the same on every process.

        Raises
        ------
        ServingFailed
            Activations of a process are not finite.
        """
        self._heard = Told(
            words=tuple(map(min, zip(*(one.words for one in told), strict=True))),
            rows=[sum(rows) for rows in zip(*(one.rows for one in told), strict=True)],
            pairs=[sum(pairs) for pairs in zip(*(one.pairs for one in told), strict=True)],
        )
        fault = self._heard.words[1]
        if fault != NO_FAULT:
            raise ServingFailed(
                f"{self.name('forward')}: activations on process {fault} are not finite (NaN or "
                "infinite); look for the cause in the layers before this one"
            )

    def name(self, what: str) -> str:
        """Return what part of which forward something is, for errors."""
        return f"{what} of layer {self._layer_id}, step {self.step}"
