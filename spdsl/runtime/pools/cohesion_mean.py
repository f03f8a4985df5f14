"""cohesion_mean: how alike the tokens of a cell are, as an entry whose numbers add up to it.

It is one number in two columns, the second one what the first leaves out in the dtype of the entries: a cache of 16
bits keeps 16 digits of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spdsl.runtime.entries.close_kernel import close_by_pool
from spdsl.runtime.launch.launch import wide
from spdsl.runtime.pools.pool import Pool


def pool_cohesion_mean(c: Tensor, there: Tensor | None) -> Tensor:
    """The mean of the cosines of all pairs of tokens, those with themselves too: the square of their mean direction."""
    mean = directions_of(c).sum(3) / _tokens(c, there).unsqueeze(-1)
    return in_columns(mean.square().sum(-1), c)


def directions_of(x: Tensor) -> Tensor:
    """Vectors of length 1, or 0 as they are."""
    x = x.to(wide(x.dtype))
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length.masked_fill(length == 0, 1.0)


def _tokens(c: Tensor, there: Tensor | None) -> Tensor:
    return torch.full_like(c[:, :, :, 0, 0], c.shape[3]) if there is None else there.sum(2).unsqueeze(1)


def in_columns(number: Tensor, c: Tensor) -> Tensor:
    found = torch.zeros_like(c[:, :, :, 0])
    found[..., 0] = number.to(c.dtype)
    found[..., 1] = (number - found[..., 0].to(number.dtype)).to(c.dtype)
    return found


COHESION_MEAN = Pool("cohesion_mean", pool_cohesion_mean, close_by_pool)
