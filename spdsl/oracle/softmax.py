"""Softmax, merge and KL over dense float64 tensors; rows without an entry give 0 and -inf, and no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

Part = tuple[Tensor, Tensor]  # out float64 [B, Hq, N, Dv], natural-log lse [B, Hq, N] (gate: [B, Hq, N, branches])


def normalised(logits: Tensor, values: Tensor) -> Part:
    """Softmax over the last axis times values [.., M, Dv]; a row of -inf only gives 0 and lse -inf, no gradient."""
    weights, total, lse = _sums(logits)
    return weights / total @ values, lse.squeeze(-1)


def log_sum_exp(logits: Tensor) -> Tensor:
    """Over the last axis: [.., N, M] -> [.., N]."""
    return _sums(logits)[2].squeeze(-1)


def _sums(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [.., M] below one common factor, their sum (1 where it is 0) and the lse, both [.., 1]."""
    if logits.shape[-1] == 0:
        empty = logits.new_zeros(*logits.shape[:-1], 1)
        return logits, empty + 1, empty - torch.inf
    top = logits.detach().amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = torch.exp(logits - top)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    return weights, total, torch.where(empty, -torch.inf, top + torch.log(total))


def merged(parts: list[Part]) -> Part:
    """The exact log-sum-exp merge: every branch weighs as its share of the common denominator."""
    if any(lse.dim() == 4 for _, lse in parts):
        raise ValueError("a gate has no common denominator and cannot be merged")
    lses = torch.stack([lse for _, lse in parts], -1)  # the logits of a softmax over the branches
    out, lse = normalised(lses.unsqueeze(-2), torch.stack([out for out, _ in parts], -2))
    return out.squeeze(-2), lse.squeeze(-1)


def divergence(target: Tensor, score: Tensor) -> Tensor:
    """KL of two distributions in logits [.., N, M] -> [.., N]. No gradient to the target; 0 where it sees nothing."""
    log_target, log_score = target.detach() - _finite_lse(target.detach()), score - _finite_lse(score)
    share = torch.exp(log_target)
    return torch.where(share > 0, share * (log_target - log_score), 0.0).sum(-1)


def _finite_lse(logits: Tensor) -> Tensor:
    lse = _sums(logits)[2]
    return torch.where(lse == -torch.inf, 0.0, lse)
