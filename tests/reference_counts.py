"""Counting routed tokens the slow way, to hold the recorder against.

Nothing of the recorder is used: modules are patched, not hooked, and counts are made token by
token in Python.
"""

from __future__ import annotations

import numpy as np


class Reference:
    """Counts what the experts modules of a model are given, while it is run through ``run``."""

    def __init__(self, layers):
        self.counts = {phase: {} for phase in ("prefill", "decode")}
        self._layers = layers
        self._phase = self._mask = None
        for layer in layers:
            self._patch(layer)

    def run(self, model, input_ids, mask=None):
        self._phase = "decode" if input_ids.shape[1] == 1 else "prefill"
        self._mask = None if mask is None else mask.reshape(-1).tolist()
        model(input_ids=input_ids, attention_mask=mask, use_cache=False)

    def array(self, phase):
        by_layer = self.counts[phase]
        experts = self._layers[0].num_experts
        counts = np.zeros((len(self._layers), experts), np.int64)
        for row, layer in enumerate(self._layers):
            for expert, number in by_layer.get(layer.layer_id, {}).items():
                if 0 <= expert < experts:
                    counts[row, expert] = number
        return counts

    def _patch(self, layer):
        forward = layer.module.forward
        choice = self._of_router if layer.scores_at is not None else self._of_experts

        def patched(*args, **kwargs):
            output = forward(*args, **kwargs)
            self._count(layer.layer_id, choice(args, kwargs, output))
            return output

        layer.module.forward = patched

    @staticmethod
    def _of_experts(args, kwargs, _output):
        names = ("top_k_index", "router_indices")
        return next((kwargs[n] for n in names if n in kwargs), args[1] if len(args) > 1 else None)

    @staticmethod
    def _of_router(_args, _kwargs, output):
        # Llama 4: scores of experts that were not chosen are 0. JetMoe: rows sorted by expert.
        if len(output) == 2:
            return [row.nonzero().flatten() for row in output[0] > 0]
        _, token, _, sizes, _ = output
        sizes = sizes if isinstance(sizes, list) else sizes.tolist()
        chosen = np.repeat(np.arange(len(sizes)), sizes)
        order = np.argsort(token.cpu().numpy(), kind="stable")
        return chosen[order].reshape(int(token.max()) + 1, -1)

    def _count(self, layer_id, chosen):
        counts = self.counts[self._phase].setdefault(layer_id, {})
        for token, experts in enumerate(chosen):
            if self._mask is not None and not self._mask[token]:
                continue
            for expert in experts.tolist():
                counts[expert] = counts.get(expert, 0) + 1
