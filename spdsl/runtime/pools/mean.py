"""mean: the mean of the tokens of a cell that are there."""

from __future__ import annotations

from torch import Tensor

from spdsl.runtime.entries.close_streamed import close_streamed
from spdsl.runtime.entries.entry_tiles import cell_sizes
from spdsl.runtime.language import tl
from spdsl.runtime.launch.launch import wide
from spdsl.runtime.pools.pool import Closed, Pool, Streamed
from spdsl.runtime.pools.sums import cell_sum_add, cell_sum_start, sum_add, sum_start
from spdsl.runtime.tiles.kernel import jit


def pool_mean(c: Tensor, there: Tensor | None) -> Tensor:
    if there is None:
        return c.mean(3, dtype=wide(c.dtype)).to(c.dtype)
    return (c.sum(3, dtype=wide(c.dtype)) / there.sum(2)[:, None, :, None]).to(c.dtype)


@jit
def mean_finish(state, entry, tokens, C):
    return state[0] / cell_sizes(entry, tokens, C)


@jit
def mean_spread(dout, kept, entry, place, inside, tokens, weights, h, C):
    return dout / cell_sizes(entry, tokens, C)


@jit
def cell_mean_finish(state, first, C):
    return state[0] / (tl.minimum(first, 0) + C.WIDTH).to(C.ACC)


MEAN = Pool(
    "mean",
    pool_mean,
    close_streamed,
    Streamed(sum_start, sum_add, mean_finish, None, mean_spread, tl.constexpr(4)),
    Closed(cell_sum_start, cell_sum_add, cell_mean_finish),
)
