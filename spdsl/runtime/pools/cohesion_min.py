"""cohesion_min: how far the token of a cell is that is least like its mean, as an entry whose numbers add up to it."""

from __future__ import annotations

import torch
from torch import Tensor

from spdsl.runtime.entries.close_kernel import close_by_pool
from spdsl.runtime.launch.launch import wide
from spdsl.runtime.pools.cohesion_mean import directions_of, in_columns
from spdsl.runtime.pools.pool import Pool


def pool_cohesion_min(c: Tensor, there: Tensor | None) -> Tensor:
    """The least cosine of a token and the mean of all."""
    mean = c.to(wide(c.dtype)).sum(3, keepdim=True)
    cosines = (directions_of(c) * directions_of(mean)).sum(-1)
    if there is not None:
        cosines = cosines.masked_fill(~there.unsqueeze(1), torch.inf)
    return in_columns(cosines.amin(3), c)


COHESION_MIN = Pool("cohesion_min", pool_cohesion_min, close_by_pool)
