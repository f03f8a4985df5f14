"""softmax(stream): the sum over the tokens w of softmax_w(z[.., w, :]) * c[.., w, :]; z are the cells of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from spdsl.runtime.entries.close_streamed import cell_tokens, close_streamed
from spdsl.runtime.entries.entries import present
from spdsl.runtime.language import tl
from spdsl.runtime.launch.launch import wide
from spdsl.runtime.pools.pool import Closed, Pool
from spdsl.runtime.tiles.kernel import jit


def pool_softmax(c: Tensor, there: Tensor | None, z: Tensor) -> Tensor:
    """z like c, or of size 1 where it is shared."""
    return (torch.softmax(present(z, there), 3, dtype=wide(c.dtype)) * c).sum(3).to(c.dtype)


@jit
def cell_softmax_start(side, C):
    top = tl.full((side.DIM_PADDED,), float("-inf"), C.ACC)
    weights = tl.zeros((side.DIM_PADDED,), dtype=C.ACC)
    return top, weights, tl.zeros((side.DIM_PADDED,), dtype=C.ACC)


@jit
def cell_softmax_add(state, value, side, h, w, home, slot, there, C):
    """For each dim by itself."""
    top, weights, total = state
    value = value.to(C.ACC)
    z = cell_tokens(side.logits, h, home, slot, there, side.DIM, side.DIM_PADDED, side.LOGITS).to(C.ACC)
    z = tl.where(there[:, None], z, float("-inf"))
    higher = tl.maximum(top, tl.max(z, 0))
    shift = tl.where(higher == float("-inf"), 0.0, higher)  # so far no token is there
    p, kept = tl.exp(z - shift[None, :]), tl.exp(top - shift)
    total = total * kept + tl.sum(p * value, 0)
    weights = weights * kept + tl.sum(p, 0)
    return higher, weights, total


@jit
def cell_softmax_finish(state, first, C):
    return state[2] / state[1]


SOFTMAX = Pool(
    "softmax",
    pool_softmax,
    close_streamed,
    closed=Closed(cell_softmax_start, cell_softmax_add, cell_softmax_finish),
)
