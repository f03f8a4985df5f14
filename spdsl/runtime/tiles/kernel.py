"""What every kernel starts with: `jit`, and the named tuples in which it gets its arguments and keeps its tiles.

`Strided` tensors, `Source` (the keys of one stream), `Call` (rows and positions), `C` (all compile-time constants).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from spdsl.runtime.language import tl, triton

jit = triton.jit

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2E): the hardware has exp2 only
LN2 = tl.constexpr(0.6931471805599453)


class Strided(NamedTuple):
    """A tensor [batch, head, token, ...] for a kernel: its data and its strides in elements (the last one is 1)."""

    data: torch.Tensor
    batch: int
    head: int
    token: int


class Source(NamedTuple):
    """The keys and values of one stream: [batch, head, token, dim], or [page, head, PAGE, dim] with a page table.

    `spans` int32 [S, 2] = (start, count) of each sequence's keys; without it every sequence has `keys` of them.
    """

    k: Strided
    v: Strided
    keys: int
    spans: torch.Tensor | None
    pages: torch.Tensor | None
    page_width: int
    GROUP: tl.constexpr  # query heads per head of the stream


class Call(NamedTuple):
    """The rows and tokens of a call. Row i has position q_offset + i and token j k_offset + j, if given.

    q_origins int32 [S]: the positions of the first rows of sequences, where rows are no tokens.
    """

    q_count: int
    k_count: int
    q_spans: torch.Tensor | None
    k_spans: torch.Tensor | None
    q_offset: int | None
    k_offset: int | None
    LEAVES: tl.constexpr  # whether programs of a result that does not answer at a sequence's length return at once
    q_origins: torch.Tensor | None = None


class Rows(NamedTuple):
    """One tile of query rows: q in two parts, positions [rows, 1], query head."""

    q0: tl.tensor
    q1: tl.tensor
    position: tl.tensor
    head: tl.tensor


class RowGrads(NamedTuple):
    """What the backward knows of a tile of rows: dout in two parts, lse [rows, 1] (base 2), delta [rows, 1]."""

    dout0: tl.tensor
    dout1: tl.tensor
    lse: tl.tensor
    delta: tl.tensor


class Keys(NamedTuple):
    """The keys of one sequence and head: key j has position origin + j; `length` is the end of all positions."""

    k: Strided
    v: Strided
    pages: tl.tensor
    origin: tl.tensor
    count: tl.tensor
    length: tl.tensor


class Block(NamedTuple):
    """The keys of one step, at `position` [1, BLOCK_N]: the block of this `number`, from which on `left` are there.

    Gathered ones (C.GATHERED) have a token each as `number`, and what is `left` from it on, [BLOCK_N]; where a list has
    ended, that is the first token that the sequence does not have.
    """

    number: tl.tensor
    left: tl.tensor
    position: tl.tensor


class KeyBlock(NamedTuple):
    """One block of keys and values in two parts each, positions [keys, 1]; `end` is the position after the last key."""

    k0: tl.tensor
    k1: tl.tensor
    v0: tl.tensor
    v1: tl.tensor
    position: tl.tensor
    end: tl.tensor
    length: tl.tensor


class RowTile(NamedTuple):
    """A tile of rows as a block of keys meets it: q in two parts [M, D], position [1, M], head, one or [1, M].

    What else a row has is loaded where it is needed: row r is query `query[r]` of head `heads[r]`, both counted from
    where dout, lse and delta begin. Neighbouring rows of one head have `heads` 0, and begin with query `first`.
    """

    q0: tl.tensor
    q1: tl.tensor
    position: tl.tensor
    head: tl.tensor
    dout: Strided
    lse: Strided
    delta: Strided
    first: tl.tensor
    query: tl.tensor
    heads: tl.tensor
    inside: tl.tensor


class HeadRows(NamedTuple):
    """All rows of one query head of a sequence: row i has position origin + i."""

    q: Strided
    dout: Strided
    lse: Strided
    delta: Strided
    head: tl.tensor
    origin: tl.tensor
    count: tl.tensor


class Range(NamedTuple):
    """Blocks first..end - 1 to visit; those of full_first..full_end - 1 need no mask."""

    first: tl.tensor
    full_first: tl.tensor
    full_end: tl.tensor
    end: tl.tensor


class RangeVisit(NamedTuple):
    """The blocks of one program: how many are full and partial, and the ranges they lie in."""

    full_count: tl.tensor
    partial_count: tl.tensor
    ranges: tl.tuple


class ListVisit(NamedTuple):
    """The blocks of one program: how many are full and partial, and the lists of their numbers."""

    full_count: tl.tensor
    partial_count: tl.tensor
    full: tl.tensor
    partial: tl.tensor


class Const(NamedTuple):
    """What a kernel is compiled for (all tl.constexpr, but for a scale that the call gives).

    A head dimension is loaded in at most two parts of power-of-two widths, D0 + D1 >= dim (80 = 64 + 16); D1 = 0: one.
    """

    QK_DIM: tl.constexpr
    QK0: tl.constexpr
    QK1: tl.constexpr
    V_DIM: tl.constexpr
    V0: tl.constexpr
    V1: tl.constexpr
    BLOCK_M: tl.constexpr  # rows of a tile; in decode the query heads of a program, padded to 16
    BLOCK_N: tl.constexpr  # keys of a block
    GROUP: tl.constexpr  # query heads of a program (decode, dK/dV)
    SPLITS: tl.constexpr  # programs per group in decode
    PAGE: tl.constexpr  # keys per page; 0: not paged
    GATHERED: tl.constexpr  # whether a list names the keys of a block one by one
    SCALE: tl.constexpr
    ACC: tl.constexpr  # dtype of accumulators
    PRECISION: tl.constexpr  # of fp32 dots
