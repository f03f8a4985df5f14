"""min: the least number of each dim, of the tokens of a cell that are there; NaN where one of them is NaN.

The gradient goes to the first minimum, or to the first NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spdsl.runtime.entries.close_streamed import close_streamed
from spdsl.runtime.entries.entries import present
from spdsl.runtime.language import tl
from spdsl.runtime.pools.extremes import (
    cell_extreme_finish,
    extreme_finish,
    extreme_kept,
    extreme_spread,
    first_place,
    some_nan,
)
from spdsl.runtime.pools.pool import Closed, Pool, Streamed
from spdsl.runtime.tiles.kernel import jit


def pool_min(c: Tensor, there: Tensor | None) -> Tensor:
    return present(c, there, torch.inf).min(3).values


@jit
def min_start(x, first, C):
    return tl.full((C.BLOCK, C.DIM_PADDED), float("inf"), x.data.dtype.element_ty), first_place(first, C)


@jit
def min_add(state, value, w, there, weights, h, C):
    best, place = state
    better = there[:, None] & ((value < best) | ((value != value) & (best == best)))
    return tl.where(better, value, best), tl.where(better, w, place)


@jit
def cell_min_start(side, C):
    return tl.full((side.DIM_PADDED,), float("inf"), C.ACC), tl.zeros((side.DIM_PADDED,), dtype=tl.int32)


@jit
def cell_min_add(state, value, side, h, w, home, slot, there, C):
    best, undefined = state
    value = value.to(C.ACC)
    undefined = some_nan(undefined, value)
    return tl.minimum(best, tl.min(tl.where(there[:, None] & (value == value), value, float("inf")), 0)), undefined


MIN = Pool(
    "min",
    pool_min,
    close_streamed,
    Streamed(min_start, min_add, extreme_finish, extreme_kept, extreme_spread, tl.constexpr(2)),
    Closed(cell_min_start, cell_min_add, cell_extreme_finish),
)
