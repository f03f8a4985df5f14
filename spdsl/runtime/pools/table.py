"""The pools, a record in a file for each. A new one is a file beside these and a line here."""

from __future__ import annotations

from torch import Tensor

from spdsl.runtime.entries.entries import Cells, cells_of, compress
from spdsl.runtime.pools.cohesion_mean import COHESION_MEAN
from spdsl.runtime.pools.cohesion_min import COHESION_MIN
from spdsl.runtime.pools.max import MAX
from spdsl.runtime.pools.mean import MEAN
from spdsl.runtime.pools.min import MIN
from spdsl.runtime.pools.mlp import MLP
from spdsl.runtime.pools.pool import Pool
from spdsl.runtime.pools.softmax import SOFTMAX
from spdsl.runtime.pools.weighted import WEIGHTED
from spdsl.runtime.sequences import Layout

POOLS: dict[str, Pool] = {
    pool.name: pool for pool in (MEAN, MAX, MIN, WEIGHTED, MLP, SOFTMAX, COHESION_MEAN, COHESION_MIN)
}


def entries_by_torch(
    by: str, x: Tensor, cells: Cells, layout: Layout, *weights: Tensor, logits: Tensor | None = None
) -> Tensor:
    """x [B, H, M, D] -> entries [B, H, E, D]; differentiable. logits [B, H, M, D or 1]: what weighs the tokens."""
    beside = () if logits is None else (cells_of(logits, cells, layout),)
    return compress(x, cells, layout, lambda c, there: POOLS[by].entries(c, there, *beside, *weights))
