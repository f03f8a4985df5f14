"""What the library knows of a pool, the way from the tokens of a cell to its entry: one record for each.

The compiler has a record of the same name with what the language and the cost need.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from spdsl.runtime.language import tl


class Streamed(NamedTuple):
    """Device functions that make a block of entries place by place of their cells, and give tokens their gradient.

    start(x, first, C) -> state, a tuple; first [BLOCK] the cells' first tokens
    add(state, value, w, there, weights, h, C) -> state, with the tokens [BLOCK, DIM_PADDED] at place w of all cells, 0
        where one is not there; weights those of the pool, or None
    finish(state, entry, tokens, C) -> entries [BLOCK, DIM_PADDED]
    kept(state) -> int32 [BLOCK, DIM_PADDED] that `spread` reads again; None: nothing
    spread(dout, kept, entry, place, inside, tokens, weights, h, C) -> of the gradients of entries the part of the
        tokens at places [BLOCK] of their cells
    """

    start: Any
    add: Any
    finish: Any
    kept: Any
    spread: Any
    UNROLL: tl.constexpr  # places in a turn of the loop


class Closed(NamedTuple):
    """Device functions that make the entry of one cell in a cache, from tiles of its tokens.

    start(side, C) -> state, a tuple
    add(state, value, side, h, w, home, slot, there, C) -> state, with tokens [ROWS, DIM_PADDED] at places w [ROWS] of
        the cell, 0 where one is not there; home and slot say where they are
    finish(state, first, C) -> the entry [DIM_PADDED]; first is the cell's first token
    """

    start: Any
    add: Any
    finish: Any


class Pool(NamedTuple):
    """entries: cells [B, H, E, width, D], which of their tokens are there, bool [B or 1, E, width] (None: all), the
    cells of logits if tokens are weighed, the weights -> entries [B, H, E, D] in the dtype of the cells, summed in fp32
    or wider; differentiable.

    close: makes the entries of a `Closing` on a GPU. streamed: where kernels make them in `attention`, else torch does.
    learn: (dout, x, cells, layout, *weights) -> the gradients of the weights, where kernels give those of tokens.
    """

    name: str
    entries: Callable[..., Tensor]
    close: Callable[..., None]
    streamed: Streamed | None = None
    closed: Closed | None = None
    learn: Callable[..., tuple[Tensor, ...]] | None = None
