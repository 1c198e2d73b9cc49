"""What the layer has to give, computed without slots, ranks or exchanges.

Shape letters: T tokens, H hidden size, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from eplb.runtime.ep.experts import Activation, gated_silu, run_expert

__all__ = ["reference_output", "relative_error"]


def reference_output(
    x_TH: torch.Tensor,
    topk_TK: torch.Tensor,
    weight_TK: torch.Tensor,
    expert: Callable[[int], Mapping[str, torch.Tensor]],
    activation: Activation = gated_silu,
) -> torch.Tensor:
    """Return the routed experts' output in float32, shape [T, H].

    ``expert(e)`` returns the tensors of logical expert ``e``, which are converted to float32.
    """
    y_TH = torch.zeros(x_TH.shape, dtype=torch.float32, device=x_TH.device)
    for e in torch.unique(topk_TK).tolist():
        if e < 0:
            continue
        token, k = torch.nonzero(topk_TK == e, as_tuple=True)
        tensors = {
            name: value if name.endswith("_scale") or value.dtype.itemsize == 1 else value.float()
            for name, value in expert(e).items()
        }
        out = run_expert(x_TH[token].float(), tensors, activation)
        y_TH.index_add_(0, token, out * weight_TK[token, k, None].float())
    return y_TH


def relative_error(y_TH: torch.Tensor, reference_TH: torch.Tensor) -> float:
    """Return the largest over tokens of |y - reference| / |reference|, Euclidean norms.

    A token whose reference is 0 has to be 0 exactly.
    """
    if not len(y_TH):
        return 0.0
    distance_T = (y_TH.float() - reference_TH.float()).norm(dim=1)
    norm_T = reference_TH.float().norm(dim=1)
    ratio_T = torch.where(distance_T == 0, 0.0, distance_T / norm_T)
    return float(ratio_T.max())
