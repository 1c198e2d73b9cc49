"""Records what the routers of a running model do.

``record(model, "loads.npz")`` attaches to a transformers model; any other model calls
:meth:`Recorder.observe` where it routes and :meth:`Recorder.step` after each step. Counting is
:mod:`eplb.profiles.recorder_counters`, finding layers :mod:`eplb.profiles.recorder_layers`,
attaching to them :mod:`eplb.profiles.recorder_hooks`, and everything that waits is done on a
thread of its own by :mod:`eplb.profiles.recorder_writer`.
Shape letters: T tokens, K top-k.
"""

from __future__ import annotations

import atexit
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, Unpack

import torch
from torch import nn

from eplb.errors import InvalidInput, unknown_name
from eplb.load_profile import PHASES
from eplb.profiles.recorder_counters import Counters
from eplb.profiles.recorder_hooks import Hooks, check_free
from eplb.profiles.recorder_layers import MoELayer, find_layers
from eplb.profiles.recorder_options import Options, Settings
from eplb.profiles.recorder_sampler import Sampler
from eplb.profiles.recorder_writer import Closed, Writer

__all__ = ["Recorder", "record"]

Phase = Literal["prefill", "decode", "mixed"]
_log = logging.getLogger("eplb.recorder")


class Recorder:
    """Counts routed tokens per layer and logical expert, window by window, into a profile file.

    Parameters
    ----------
    path : path
        The profile, ``.npz``. While recording goes on it is ``path + ".journal"``, which every
        command reads under the name of the profile.
    num_experts : int
        Logical experts of a layer.
    layer_ids : sequence of int
        Absolute decoder layer ids of the layers that will be observed.
    mtp_layer_ids : sequence of int
        Layers of multi-token prediction, kept apart in the array ``mtp_counts``.
    num_columns : int, optional
        Number of expert ids where it is larger than that of experts: identity experts, which are
        placed nowhere, are ids from ``num_experts`` on.
    top_k : int, optional
        Experts of a token; by default seen from the first tokens.
    device : device
        Where the counts are kept: that of the model.
    **options
        See :class:`~eplb.profiles.recorder_options.Options`.

    Raises
    ------
    InvalidInput
        An argument cannot be used, or the file cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        num_experts: int,
        layer_ids: Sequence[int],
        mtp_layer_ids: Sequence[int] = (),
        num_columns: int | None = None,
        top_k: int | None = None,
        device: torch.device | str = "cpu",
        **options: Unpack[Options],
    ) -> None:
        self.path = Path(path)
        if self.path.suffix.lower() != ".npz":
            raise InvalidInput(f"a recording becomes a .npz file; {self.path} is named otherwise")
        self.layer_ids = _layer_ids(layer_ids, mtp_layer_ids)
        if num_experts < 1:
            raise InvalidInput(f"num_experts ({num_experts}) must be at least 1")
        self.device = torch.device(device)
        self._settings = settings = Settings.of(options)
        self._index = {layer_id: i for i, layer_id in enumerate(self.layer_ids)}
        self._counters = Counters(
            len(PHASES), len(self.layer_ids), num_experts, num_columns or num_experts, self.device
        )
        self._sampler: Sampler | None = None
        self._top_k: dict[int, int] = dict.fromkeys(range(len(self.layer_ids)), top_k or 0)
        if top_k:
            self._start_sampler(top_k)
        self._writer = Writer(
            path=self.path,
            counters=self._counters,
            layer_ids=self.layer_ids,
            num_mtp=len(mtp_layer_ids),
            top_k=self._top_k,
            settings=settings,
        )
        self._hooks: Hooks | None = None
        self._mask: torch.Tensor | None = None
        self._scenario = settings.scenario
        self._steps = 0
        self._window = 0
        self._window_steps = 0
        self._opened_s = self._start_s = self._writer.start_s
        self._told: set[str] = set()
        self._closed = False
        atexit.register(self.close)

    def observe(
        self,
        layer_id: int,
        topk_ids: torch.Tensor,
        mask: torch.Tensor | None = None,
        *,
        phase: Phase = "mixed",
    ) -> None:
        """Count the experts that tokens were routed to; call it wherever a layer has chosen them.

        Nothing waits for the device, and ids may be of any integer type. Ids below 0 mean "not
        routed". Ids that are no expert are not counted, and logged when their window is written.

        Parameters
        ----------
        layer_id : int
        topk_ids : Tensor of int, shape [T, K], or [..., K], or [T] with one expert a token
            Logical experts.
        mask : Tensor, shape [T] or [...], optional
            Zero or false for padding and dummy tokens.
        phase : str
            ``prefill``, ``decode`` or ``mixed``.

        Raises
        ------
        InvalidInput
            A layer or phase that is not known, or tensors of another shape or type.
        """
        ids_TK = topk_ids.reshape(-1, topk_ids.shape[-1] if topk_ids.ndim > 1 else 1)
        if ids_TK.is_floating_point() or ids_TK.dtype == torch.bool:
            raise InvalidInput(
                f"topk_ids must be whole numbers, the experts chosen; got {topk_ids.dtype}"
            )
        if ids_TK.dtype not in {torch.int32, torch.int64}:
            ids_TK = ids_TK.to(torch.int32)
        weight_TK = None
        if mask is not None:
            if mask.numel() != ids_TK.shape[0]:
                raise InvalidInput(
                    f"mask has {mask.numel()} entries for {ids_TK.shape[0]} tokens; give one each"
                )
            weight_TK = (mask.reshape(-1, 1) != 0).to(torch.int32).expand_as(ids_TK)
        if phase not in PHASES:
            raise unknown_name("phase", phase, PHASES)
        self.count(self.index_of(layer_id), [ids_TK], weight_TK, phase, checked=False)

    def step(self) -> None:
        """End a step: after each forward pass, replay of a graph, or idle step.

        Attached models do it themselves, except where their forward is a captured graph or was
        compiled in place (``model.compile()``).
        """
        if self._closed or _is_capturing(self.device):
            return
        self._steps += 1
        self._window_steps += 1
        if self._sampler is not None:
            self._sampler.advance()
        settings, now = self._settings, time.time()
        if settings.every_steps is not None:
            window = self._steps // settings.every_steps
        else:
            window = int((now - self._start_s) / settings.every_s)
        if window > self._window:
            self._close_window(now)
            self._window = window

    def discard(self) -> None:
        """Forget what was counted since the last window closed: warm-up before a capture, say."""
        self._close_window(time.time(), discard=True)

    @property
    def scenario(self) -> str:
        """What windows are labelled as; setting it closes the open window.

        Where ranks are reduced it applies to the open window.
        """
        return self._scenario

    @scenario.setter
    def scenario(self, name: str) -> None:
        if self._window_steps and self._settings.reduce is False:
            self._close_window(time.time())
        self._scenario = name

    def mask_next(self, mask: torch.Tensor) -> None:
        """Give the next forward of an attached model the mask [B, S] that its arguments lack."""
        self._mask = mask

    def close(self) -> None:
        """Detach, close the last window and turn the journal into the profile.

        Of ranks that reduce, all must call it.
        """
        if self._closed:
            return
        if self._hooks is not None:
            self._hooks.remove()
        self._close_window(time.time(), last=True)
        self._closed = True
        atexit.unregister(self.close)
        outside = self._hooks.calls_outside if self._hooks is not None else 0
        self._writer.close(steps=self._steps, calls_outside=outside)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def device_bytes(self) -> int:
        """Memory that the recorder holds on the device."""
        sampler = 0 if self._sampler is None else self._sampler.device_bytes
        return self._counters.device_bytes + sampler

    def index_of(self, layer_id: int) -> int:
        """Return the place of a layer among those recorded.

        Raises
        ------
        InvalidInput
            It is none of them.
        """
        if layer_id not in self._index:
            raise InvalidInput(
                f"layer id {layer_id} is not recorded; name it in layer_ids when the recorder is "
                "made, because its buffers are fixed then"
            )
        return self._index[layer_id]

    def count(
        self,
        first: int,
        ids: list[torch.Tensor],
        weight_TK: torch.Tensor | None,
        phase: str,
        *,
        checked: bool = True,
    ) -> None:
        """Count choices [T, K] of the layer at index ``first`` and those behind it.

        ``checked`` says that all ids are in range; see :meth:`Counters.add`.
        """
        if self._closed:
            return
        if ids[0].device != self.device:
            ids = [ids_TK.to(self.device) for ids_TK in ids]
            weight_TK = None if weight_TK is None else weight_TK.to(self.device)
        if not torch.compiler.is_compiling():
            for index in range(first, first + len(ids)):
                self._top_k[index] = self._top_k[index] or ids[0].shape[1]
            if self._sampler is None:
                self._start_sampler(ids[0].shape[1])
        phase_idx = PHASES.index(phase)
        if len(ids) > 1:
            self._counters.add_layers(phase_idx, first, ids, weight_TK)
        else:
            self._counters.add(phase_idx, first, ids[0], weight_TK, checked=checked)
        if self._sampler is not None:
            for index, ids_TK in enumerate(ids, start=first):
                self._sampler.add(index, ids_TK, weight_TK)

    def take_mask(self) -> torch.Tensor | None:
        """Return the mask of :meth:`mask_next` once."""
        mask = self._mask
        if mask is not None:
            self._mask = None
        return mask

    def attach(
        self, model: nn.Module, layers: tuple[MoELayer, ...], *, count_finished: bool = False
    ) -> None:
        """Attach to the layers this recorder was made for; :func:`record` does it all."""
        self._hooks = Hooks(self, model, layers, count_finished=count_finished)

    def _start_sampler(self, top_k: int) -> None:
        if self._settings.sample_tokens:
            self._sampler = Sampler(
                self._settings.sample_tokens,
                len(self.layer_ids),
                top_k,
                self._counters.num_experts,
                self.device,
            )

    def _close_window(self, now: float, *, discard: bool = False, last: bool = False) -> None:
        if self._closed:
            return
        sampled = None if self._sampler is None else self._sampler.take()
        while (pending := self._counters.snapshot(sampled)) is None and last:
            time.sleep(0.01)
        if pending is None:
            if "busy" not in self._told:
                self._told.add("busy")
                _log.warning("windows close faster than they are written; some become longer")
            return
        self._writer.put(
            Closed(
                pending=pending,
                window=self._window,
                time_s=self._opened_s,
                steps=self._window_steps,
                scenario=self._scenario,
                discard=discard,
                last=last,
            )
        )
        self._opened_s, self._window_steps = now, 0


def record(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    count_finished: bool = False,
    **options: Unpack[Options],
) -> Recorder:
    """Attach a recorder to a transformers model, before its first compiled call.

    Parameters
    ----------
    model : Module
        A model of transformers, or what ``torch.compile`` made of one.
    path : path
        The profile to write, ``.npz``.
    count_finished : bool
        Count the tokens that ``generate`` feeds to sequences which have ended.
    **options
        See :class:`~eplb.profiles.recorder_options.Options`.

    Raises
    ------
    InvalidInput
        The model has no mixture-of-experts layers, is being recorded already, or the file cannot
        be written.

    Examples
    --------
    >>> with record(model, "loads.npz", every_steps=100):  # doctest: +SKIP
    ...     model.generate(**inputs)
    """
    inner = getattr(model, "_orig_mod", model)
    layers = find_layers(inner)
    check_free(layers)
    device = next(layers[0].module.parameters()).device
    named = options.copy()
    named["metadata"] = {"model": _name(inner), **options.get("metadata", {})}
    recorder = Recorder(
        path,
        num_experts=layers[0].num_experts,
        layer_ids=[layer.layer_id for layer in layers if not layer.is_mtp],
        mtp_layer_ids=[layer.layer_id for layer in layers if layer.is_mtp],
        num_columns=max(layer.num_columns for layer in layers),
        top_k=layers[0].top_k,
        device=device,
        **named,
    )
    recorder.attach(model, layers, count_finished=count_finished)
    return recorder


def _name(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    return (
        getattr(config, "_name_or_path", "")
        or getattr(config, "model_type", "")
        or type(model).__name__
    )


def _layer_ids(main: Sequence[int], mtp: Sequence[int]) -> tuple[int, ...]:
    ids = (*map(int, main), *map(int, mtp))
    if not main:
        raise InvalidInput("no layer to record; give layer_ids")
    for layer_id in ids:
        if layer_id < 0 or ids.count(layer_id) > 1:
            raise InvalidInput(
                f"layer ids must be distinct and not negative; {layer_id} is given "
                f"{'twice' if layer_id >= 0 else ''}".rstrip()
            )
    return (*sorted(map(int, main)), *sorted(map(int, mtp)))


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
