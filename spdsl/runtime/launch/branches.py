"""Combining branches: the exact log-sum-exp merge and the gated sum. Plain torch, so that autograd sees through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def expect_one_dim(outs: Sequence[Tensor]) -> None:
    """ValueError unless all parts of a result have values of one dim."""
    dims = sorted({out.shape[-1] for out in outs})
    if len(dims) > 1:
        raise ValueError(f"branches with values of {' and '.join(map(str, dims))} dims cannot be one result")


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(out [B, H, N, D], lse [B, H, N]) of disjoint keys -> those of one softmax over all of them.

    A row that is empty in every part stays 0 with lse -inf, and gets no gradient.
    """
    lses = torch.stack([lse for _, lse in parts])
    top = lses.detach().amax(0)
    origin = torch.where(top == -torch.inf, torch.zeros_like(top), top)
    weights = torch.exp(lses - origin)
    total = weights.sum(0)
    empty = total == 0
    shares = weights / torch.where(empty, torch.ones_like(total), total)
    out = sum(share.unsqueeze(-1) * part.to(share.dtype) for share, (part, _) in zip(shares, parts, strict=True))
    lse = torch.where(empty, -torch.inf, origin + torch.log(torch.where(empty, torch.ones_like(total), total)))
    assert isinstance(out, Tensor)
    return out.to(parts[0][0].dtype), lse


def summed(names: Sequence[str], parts: Sequence[tuple[Sequence[str], list[Tensor]]]) -> list[Tensor]:
    """The gradients of `names`: what each part has of them, added up."""
    found: dict[str, Tensor] = {}
    for own, grads in parts:
        for name, grad in zip(own, grads, strict=True):
            found[name] = found[name].add_(grad) if name in found else grad
    return [found[name] for name in names]


def wanted_of(wanted: Sequence[bool], names: Sequence[str]) -> list[str]:
    return [name for name, one in zip(names, wanted, strict=True) if one]


def summed_by_name(
    wanted: Sequence[str], parts: Sequence[tuple[Sequence[str], Callable[[list[bool]], list[Tensor]]]]
) -> list[Tensor]:
    """The gradients of the `wanted`. Of each part: its names, and what gives the gradients of those asked for."""
    own = [(names, gradients([name in wanted for name in names])) for names, gradients in parts]
    return summed(wanted, [([name for name in names if name in wanted], grads) for names, grads in own])


def gated_sum(parts: Sequence[tuple[Tensor, Tensor]], gates: Tensor) -> tuple[Tensor, Tensor]:
    """Branches and gates [B, H, N, branches] -> (sum of gate * out, lse per branch [B, H, N, branches])."""
    weighted = [gates[..., i, None] * part for i, (part, _) in enumerate(parts)]
    return torch.stack(weighted).sum(0).to(parts[0][0].dtype), stacked_lse(parts)


def stacked_lse(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The lse of every branch, [B, H, N, branches]."""
    return torch.cat([lse if lse.dim() == 4 else lse.unsqueeze(-1) for _, lse in parts], -1)
