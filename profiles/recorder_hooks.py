"""Attaches a recorder to a model: hooks that know which tokens are padding, and of which phase.

Hooks of the model tell the forward pass they are in apart (mask, phase); hooks of its
mixture-of-experts layers count. All of it can be traced by ``torch.compile`` and captured in CUDA
graphs; what has to stay on the host (windows, the number of steps) is left to ``Recorder.step``.
Shape letters: B batch, S positions of a forward, T = B * S tokens, K top-k, E experts.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from eplb.errors import InvalidInput
from eplb.profiles.recorder_layers import INDEX_NAMES, MoELayer

if TYPE_CHECKING:
    from eplb.profiles.recorder import Recorder

__all__ = ["Hooks", "check_free"]

_log = logging.getLogger("eplb.recorder")
# Choices that are put off to the end of the forward, to be counted with those of other layers in
# a few kernels: half a megabyte of int64, which the model's own tensors hold. Larger ones are
# counted at once, where a kernel each costs nothing beside their layer.
MAX_DEFERRED = 1 << 16

NO_MASK = (
    "attention masks of more than two dimensions do not tell which tokens are padding; these are "
    "counted (Recorder.mask_next tells)"
)
CHANGED = (
    "the experts chosen are changed in place after the router; one step was counted in part, the "
    "following are counted at once"
)
_recorded: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def check_free(layers: tuple[MoELayer, ...]) -> None:
    """Refuse layers that another recorder is attached to.

    Raises
    ------
    InvalidInput
        One of them is being recorded already.
    """
    for layer in layers:
        if layer.module in _recorded:
            raise InvalidInput(
                f"{layer.path} is being recorded to {_recorded[layer.module]}; close that "
                "recorder first"
            )


class Hooks:
    """The hooks of one recorder on one model.

    Parameters
    ----------
    recorder : Recorder
    model : Module
        As it is called: a compiled model is attached to both outside and inside.
    layers : sequence of MoELayer
    count_finished : bool
        Count tokens of sequences that have ended, which ``generate`` goes on to feed with
        end-of-sequence or padding tokens while others of the batch go on.

    Raises
    ------
    InvalidInput
        A layer is being recorded already.
    """

    def __init__(
        self,
        recorder: Recorder,
        model: nn.Module,
        layers: tuple[MoELayer, ...],
        *,
        count_finished: bool,
    ) -> None:
        check_free(layers)
        self._recorder = recorder
        self._layers = layers
        inner = getattr(model, "_orig_mod", model)
        parameters = inspect.signature(inner.forward).parameters
        self._position = {name: i for i, name in enumerate(parameters)}
        self._idle = None if count_finished else _idle_tokens(inner, recorder.device)
        self._inside = False
        self._phase = "mixed"
        self._mask: torch.Tensor | None = None
        self._weights: dict[int, torch.Tensor] = {}
        self._pending: list[tuple[int, torch.Tensor, int]] = []
        self._num_pending = 0
        self._defer = True
        self._told: set[str] = set()
        self.calls_outside = 0
        self._handles = [
            inner.register_forward_pre_hook(self._begin, with_kwargs=True),
            inner.register_forward_hook(self._end, always_call=True),
            # Outside of a compiled model this runs on the host, after each call.
            model.register_forward_hook(self._after),
        ]
        for layer in layers:
            _recorded[layer.module] = str(recorder.path)
            self._handles.append(self._attach(layer))

    def remove(self) -> None:
        """Detach; another recorder may then be attached."""
        for handle in self._handles:
            handle.remove()
        for layer in self._layers:
            _recorded.pop(layer.module, None)

    def _attach(self, layer: MoELayer) -> Any:
        index = self._recorder.index_of(layer.layer_id)
        if layer.scores_at is not None:
            at, top_k = layer.scores_at, int(layer.module.top_k)  # type: ignore[arg-type]

            def of_router(_module: nn.Module, _inputs: Any, output: Any) -> None:
                scores_TE = output[at]
                self._count(index, scores_TE.reshape(-1, scores_TE.shape[-1]).topk(top_k).indices)

            return layer.module.register_forward_hook(of_router)
        names = list(inspect.signature(type(layer.module).forward).parameters)
        name = next(n for n in names if n in INDEX_NAMES)
        position = names.index(name) - 1  # without self

        def of_experts(_module: nn.Module, args: Any, kwargs: Any) -> None:
            ids = kwargs[name] if name in kwargs else args[position]
            self._count(index, ids)

        return layer.module.register_forward_pre_hook(of_experts, with_kwargs=True)

    def _begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inside = True
        self._weights = {}
        self._pending = []
        self._num_pending = 0
        tokens = self._argument("input_ids", args, kwargs)
        shaped = tokens if tokens is not None else self._argument("inputs_embeds", args, kwargs)
        self._mask = None
        if shaped is None or shaped.ndim < 2:
            return
        num_positions = shaped.shape[1]
        self._phase = "decode" if num_positions == 1 else "prefill"
        mask = self._recorder.take_mask()
        if mask is None:
            mask = self._argument("attention_mask", args, kwargs)
        if isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[1] >= num_positions:
            # A cache makes the mask longer than the tokens of this forward, which are its last.
            self._mask = mask[:, mask.shape[1] - num_positions :].reshape(-1) != 0
        elif mask is not None and num_positions > 1:
            self._tell("no mask", NO_MASK)
        if self._idle is not None and num_positions == 1 and tokens is not None:
            ended = (tokens.reshape(-1, 1) == self._idle).any(dim=1)
            self._mask = ~ended if self._mask is None else self._mask & ~ended

    def _end(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        if self._pending:
            self._flush()
        self._inside = False
        self._mask = None
        self._weights = {}

    def _after(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._recorder.step()

    def _count(self, index: int, ids: torch.Tensor) -> None:
        compiling = torch.compiler.is_compiling()
        if not self._inside:
            # A backward pass that computes activations again; or the model's parts, called alone.
            if not compiling:
                self.calls_outside += 1
            return
        if compiling or not self._defer or ids.is_inference() or ids.numel() >= MAX_DEFERRED:
            if self._pending:
                self._flush()
            self._add(index, [ids])
            return
        self._num_pending += ids.numel()
        self._pending.append((index, ids, ids._version))
        if self._num_pending >= MAX_DEFERRED:
            self._flush()

    def _flush(self) -> None:
        """Count what was put off, layers in a row with choices of one shape at once."""
        pending, self._pending, self._num_pending = self._pending, [], 0
        run: list[torch.Tensor] = []
        for place, (index, ids, version) in enumerate(pending):
            if ids._version != version:
                self._defer = False
                self._tell("changed", CHANGED)
                continue
            run.append(ids)
            following = pending[place + 1] if place + 1 < len(pending) else None
            if (
                following is None
                or following[0] != index + 1
                or following[1].shape != ids.shape
                or following[1].dtype != ids.dtype
                or following[1].device != ids.device
                or following[1]._version != following[2]
            ):
                self._add(index + 1 - len(run), run)
                run = []

    def _add(self, first: int, layers: list[torch.Tensor]) -> None:
        """Count the choices of layers in a row, [T, K] each."""
        ids = [layer.reshape(-1, layer.shape[-1]) for layer in layers]
        weight_TK = None
        if self._mask is not None:
            num_tokens, top_k = ids[0].shape
            if self._mask.shape[0] != num_tokens:
                self._tell(f"rows {first}", f"layer {self._recorder.layer_ids[first]} routes "
                           f"{num_tokens} tokens of a batch of {self._mask.shape[0]}; it is not "
                           "counted, because its padding cannot be told")  # fmt: skip
                return
            weight_TK = self._weights.get(top_k)
            if weight_TK is None:
                weight_TK = self._mask.to(torch.int32).unsqueeze(1).expand(-1, top_k).contiguous()
                self._weights[top_k] = weight_TK
        self._recorder.count(first, ids, weight_TK, self._phase)

    def _argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in kwargs:
            return kwargs[name]
        position = self._position.get(name)
        return args[position] if position is not None and position < len(args) else None

    def _tell(self, key: str, text: str) -> None:
        if not torch.compiler.is_compiling() and key not in self._told:
            self._told.add(key)
            _log.warning("%s", text)


def _idle_tokens(model: nn.Module, device: torch.device) -> torch.Tensor | None:
    """Return the ids that ``generate`` feeds to sequences that have ended."""
    ids: set[Any] = set()
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        for name in ("eos_token_id", "pad_token_id"):
            value = getattr(config, name, None)
            ids.update(value if isinstance(value, (list, tuple)) else [value])
    known = sorted(i for i in ids if isinstance(i, int))
    return torch.tensor(known, device=device) if known else None
