"""Routers: which experts each token goes to, and with what weights.

Shape letters: T tokens, H hidden size, E logical experts, K top-k, G groups.
"""

from __future__ import annotations

import torch
from torch import nn

from eplb.errors import InvalidInput

__all__ = ["SigmoidRouter", "SoftmaxRouter"]


class SoftmaxRouter(nn.Module):
    """Softmax over all experts, then the top k, as Mixtral and Qwen3 do.

    Parameters
    ----------
    hidden_size, num_experts, top_k : int
    renormalise : bool
        Divide the weights of a token by their sum.

    Attributes
    ----------
    weight : Parameter, shape [E, H]
    """

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *, renormalise: bool = True
    ) -> None:
        super().__init__()
        _check_top_k(top_k, num_experts)
        self.top_k, self.renormalise = top_k, renormalise
        self.weight = nn.Parameter(torch.zeros(num_experts, hidden_size), requires_grad=False)

    def forward(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return expert ids int64 [T, K] and weights float32 [T, K]."""
        score_TE = torch.softmax(_logits(x_TH, self.weight), dim=1)
        weight_TK, topk_TK = score_TE.topk(self.top_k, dim=1)
        if self.renormalise:
            weight_TK = weight_TK / weight_TK.sum(dim=1, keepdim=True)
        return topk_TK, weight_TK


class SigmoidRouter(nn.Module):
    """DeepSeek-V3's router: sigmoid scores, a bias that balances, group-limited top-k.

    A group's score is the sum of its two best biased experts; the bias chooses and does not weigh
    (DeepSeek-V3 technical report, arXiv:2412.19437, sections 2.1.2 and 4.2; the published
    ``MoEGate`` of deepseek-ai/DeepSeek-V3).

    Parameters
    ----------
    hidden_size, num_experts, top_k : int
    num_groups, groups_per_token : int
        Experts of at most ``groups_per_token`` groups are chosen.
    scale : float
        Weights of a token add up to it.

    Attributes
    ----------
    weight : Parameter, shape [E, H]
    bias : Parameter, shape [E]
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        num_groups: int = 1,
        groups_per_token: int = 1,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        _check_top_k(top_k, num_experts)
        if num_groups < 1 or num_experts % num_groups or num_experts // num_groups < 2:
            raise InvalidInput(
                f"num_experts ({num_experts}) must divide into num_groups ({num_groups}) of two "
                "experts or more"
            )
        if not 1 <= groups_per_token <= num_groups:
            raise InvalidInput(
                f"groups_per_token ({groups_per_token}) must be 1 to num_groups ({num_groups})"
            )
        if groups_per_token * (num_experts // num_groups) < top_k:
            raise InvalidInput(
                f"{groups_per_token} groups of {num_experts // num_groups} experts are fewer than "
                f"top_k ({top_k})"
            )
        self.top_k, self.num_groups, self.groups_per_token = top_k, num_groups, groups_per_token
        self.scale = scale
        self.weight = nn.Parameter(torch.zeros(num_experts, hidden_size), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(num_experts), requires_grad=False)

    def forward(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return expert ids int64 [T, K] and weights float32 [T, K]."""
        score_TE = torch.sigmoid(_logits(x_TH, self.weight))
        biased_TE = score_TE + self.bias
        if self.groups_per_token < self.num_groups:
            biased_TGE = biased_TE.view(
                len(x_TH), self.num_groups, score_TE.shape[1] // self.num_groups
            )
            group_TG = biased_TGE.topk(2, dim=2).values.sum(dim=2)
            best = group_TG.topk(self.groups_per_token, dim=1).indices
            allowed_TG = torch.zeros_like(group_TG, dtype=torch.bool).scatter_(1, best, value=True)
            biased_TE = biased_TGE.masked_fill(~allowed_TG[:, :, None], -torch.inf).flatten(1)
        topk_TK = biased_TE.topk(self.top_k, dim=1).indices
        weight_TK = score_TE.gather(1, topk_TK)
        weight_TK = weight_TK / (weight_TK.sum(dim=1, keepdim=True) + 1e-20)
        return topk_TK, weight_TK * self.scale


def _logits(x_TH: torch.Tensor, weight_EH: torch.Tensor) -> torch.Tensor:
    """Return logits; float32 parameters make routing float32, as the published models do."""
    return nn.functional.linear(x_TH.to(weight_EH.dtype), weight_EH).float()


def _check_top_k(top_k: int, num_experts: int) -> None:
    if not 1 <= top_k <= num_experts:
        raise InvalidInput(f"top_k ({top_k}) must be 1 to num_experts ({num_experts})")
