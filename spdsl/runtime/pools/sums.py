"""What pools that add tokens have in common."""

from __future__ import annotations

from spdsl.runtime.language import tl
from spdsl.runtime.tiles.kernel import jit


@jit
def sum_start(x, first, C):
    return (tl.zeros((C.BLOCK, C.DIM_PADDED), dtype=C.ACC),)


@jit
def sum_add(state, value, w, there, weights, h, C):
    return (state[0] + value.to(C.ACC),)


@jit
def cell_sum_start(side, C):
    return (tl.zeros((side.DIM_PADDED,), dtype=C.ACC),)


@jit
def cell_sum_add(state, value, side, h, w, home, slot, there, C):
    return (state[0] + tl.sum(value.to(C.ACC), 0),)
