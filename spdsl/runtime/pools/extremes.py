"""What pools that take the greatest or the least token have in common: the state is (best, place in the cell)."""

from __future__ import annotations

from spdsl.runtime.entries.entry_tiles import load_vectors
from spdsl.runtime.language import tl
from spdsl.runtime.tiles.kernel import jit


@jit
def first_place(first, C):
    """Of the tokens that are there."""
    return tl.zeros((C.BLOCK, C.DIM_PADDED), tl.int32) + tl.maximum(-first, 0).to(tl.int32)[:, None]


@jit
def extreme_finish(state, entry, tokens, C):
    return state[0]


@jit
def extreme_kept(state):
    return state[1]


@jit
def extreme_spread(dout, kept, entry, place, inside, tokens, weights, h, C):
    """To the token that was taken."""
    taken = load_vectors(kept, entry, inside, C)
    return tl.where(taken == place.to(tl.int32)[:, None], dout, 0.0)


@jit
def cell_extreme_finish(state, first, C):
    """The state of a cell is (best, whether a token is NaN)."""
    return tl.where(state[1] != 0, float("nan"), state[0])


@jit
def some_nan(undefined, value):
    return tl.maximum(undefined, tl.max((value != value).to(tl.int32), 0))
