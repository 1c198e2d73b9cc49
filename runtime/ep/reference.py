"""What the layer has to give, computed without slots, ranks or exchanges.

Every expert computes every token, and a matrix of weights adds up what was chosen: slow and simple,
with nothing of how the layer works.
Shape letters: T tokens, H hidden size, K top-k, E logical experts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from eplb.runtime.ep.experts import Activation, gated_silu, whole_weight

__all__ = ["reference_output", "relative_error"]


def reference_output(
    x_TH: torch.Tensor,
    topk_TK: torch.Tensor,
    weight_TK: torch.Tensor,
    experts: Mapping[str, torch.Tensor],
    activation: Activation = gated_silu,
) -> torch.Tensor:
    """Return the routed experts' output in float32, shape [T, H].

    ``experts`` holds the tensors of all logical experts, each of shape [E, ...].
    """
    wide = torch.float32
    hidden_ETI = x_TH.to(wide) @ _wide(experts, "w13").transpose(1, 2)
    if "b13" in experts:
        hidden_ETI = hidden_ETI + experts["b13"][:, None].to(wide)
    num_experts, num_tokens = hidden_ETI.shape[:2]
    inner = activation(hidden_ETI.flatten(0, 1))
    inner_ETI = inner.view(num_experts, num_tokens, inner.shape[1])
    out_ETH = inner_ETI @ _wide(experts, "w2").transpose(1, 2)
    if "b2" in experts:
        out_ETH = out_ETH + experts["b2"][:, None].to(wide)
    # One more column takes what goes nowhere.
    chosen_TE = torch.zeros(num_tokens, num_experts + 1, dtype=wide, device=x_TH.device)
    place_TK = torch.where(topk_TK < 0, num_experts, topk_TK).long()
    chosen_TE.scatter_add_(1, place_TK, weight_TK.to(wide))
    return torch.einsum("te,eth->th", chosen_TE[:, :-1], out_ETH)


def _wide(experts: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """Return a weight in float32, FP8 with its scales."""
    if f"{name}_scale" in experts:
        return whole_weight(experts, name, torch.float32)
    return experts[name].float()


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
