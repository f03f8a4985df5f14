"""Device functions that load the keys of a block: consecutive ones, of a tensor or of pages, or gathered ones."""

from __future__ import annotations

from spdsl.runtime.language import tl
from spdsl.runtime.tiles.kernel import Block, jit
from spdsl.runtime.tiles.tiles import load_near_parts, load_parts


@jit
def block_of(keys, number, C):
    """The `number`-th block of the keys of a sequence."""
    start = number * C.BLOCK_N
    position = (keys.origin + start + tl.arange(0, C.BLOCK_N))[None, :]
    return Block(number, keys.count - start, position)


@jit
def keys_there(keys, block):
    """Which keys of a block the sequence has, [1, BLOCK_N]."""
    return block.position < keys.origin + keys.count


@jit
def key_column(keys, block, C):
    """Positions of the keys of a block as a column [BLOCK_N, 1]."""
    token = block.number if C.GATHERED else block.number * C.BLOCK_N + tl.arange(0, C.BLOCK_N)
    return (keys.origin + token)[:, None]


@jit
def load_k(keys, block, MASKED: tl.constexpr, C):
    """K of a block in two parts [BLOCK_N, D]; keys that are not there (if MASKED) are 0."""
    return load_block(keys.k, keys.pages, block, C.QK0, C.QK1, C.QK_DIM, MASKED, C)


@jit
def load_values(keys, block, MASKED: tl.constexpr, C):
    """V of a block in two parts."""
    return load_block(keys.v, keys.pages, block, C.V0, C.V1, C.V_DIM, MASKED, C)


@jit
def load_block(x, pages, block, D0: tl.constexpr, D1: tl.constexpr, DIM: tl.constexpr, MASKED: tl.constexpr, C):
    """A block of x, which has pages [pages, Hkv, PAGE, DIM] where C.PAGE: a block that is not gathered lies in one."""
    if C.GATHERED:
        part0, part1 = load_tokens(x, pages, block.number, block.left > 0, D0, D1, DIM, C)
    elif C.PAGE == 1:
        i = tl.arange(0, C.BLOCK_N)
        part0, part1 = load_tokens(x, pages, block.number * C.BLOCK_N + i, i < block.left, D0, D1, DIM, C)
    else:
        start = tl.cast(block.number, tl.int64) * C.BLOCK_N
        data = x.data
        if C.PAGE:
            data += tl.load(pages + start // C.PAGE).to(tl.int64) * x.batch
            start = start % C.PAGE
        data += start * x.token
        part0, part1 = load_near_parts(data, x.token, block.left, C.BLOCK_N, D0, D1, DIM, MASKED)
    return part0, part1


@jit
def load_tokens(x, pages, token, there, D0: tl.constexpr, D1: tl.constexpr, DIM: tl.constexpr, C):
    """Rows of x by their tokens [n], in two parts; 0 where they are not there."""
    place = tl.maximum(token, 0).to(tl.int64)
    start = tl.zeros_like(place)
    if C.PAGE:
        start = tl.load(pages + place // C.PAGE, mask=there, other=0).to(tl.int64) * x.batch
        place = place % C.PAGE
    return load_parts((x.data + start + place * x.token)[:, None], there, D0, D1, DIM, True)
