"""The exact merge of what the programs of a decode step leave: splits over keys, parts of a softmax, gated branches."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from spdsl.runtime.language import tl
from spdsl.runtime.tiles.kernel import LN2, LOG2E, jit
from spdsl.runtime.tiles.tiles import at


class Splits(NamedTuple):
    """A softmax of one query, in splits over its keys: out [B, Hq, splits, D], lse [B, Hq, splits] in base 2; wide.

    A split without a visible key has lse -inf, and its out is not read. The sink, logits [Hq], is in none of them.
    """

    out: Tensor
    lse: Tensor
    sink: Tensor | None
    dtype: torch.dtype  # of the whole

    def summed(self) -> tuple[Tensor, Tensor]:
        """What two ways to split have in common: out without the sink, in the call's dtype; lse in natural units."""
        lse = self.lse * math.log(2)
        shares = torch.softmax(lse, -1).nan_to_num().unsqueeze(-1)
        return torch.where(shares > 0, shares * self.out, 0.0).sum(2).to(self.dtype), torch.logsumexp(lse, -1)


class JoinPart(NamedTuple):
    """Splits for a kernel: they belong to one branch, and `LAST` are the last of it."""

    out: Tensor
    lse: Tensor
    sink: Tensor | None
    splits: int
    BRANCH: tl.constexpr
    LAST: tl.constexpr


class JoinConst(NamedTuple):
    """What the kernel is compiled for (all tl.constexpr)."""

    PARTS: tl.constexpr
    BRANCHES: tl.constexpr
    DIM: tl.constexpr  # 0: log-sum-exps alone
    DIM_PADDED: tl.constexpr  # to a power of two
    STEP: tl.constexpr  # splits that are added at once
    ACC: tl.constexpr  # dtype of sums


@jit
def add_sink(acc, top, total, sink, h, C):
    """Takes up its share of the softmax."""
    logit = tl.load(sink + h).to(C.ACC) * LOG2E
    new = tl.maximum(top, logit)
    origin = tl.where(new == float("-inf"), 0.0, new)
    decay = tl.exp2(top - origin)
    return acc * decay, new, total * decay + tl.exp2(logit - origin)


@jit
def add_splits(acc, top, total, part, row, C):
    """Online softmax over the splits of a part: acc [DIM_PADDED], maximum and total of the weights."""
    dims = tl.arange(0, C.DIM_PADDED)
    for first in tl.range(0, part.splits, C.STEP):
        split = first + tl.arange(0, C.STEP)
        own = tl.load(part.lse + row * part.splits + split, mask=split < part.splits, other=float("-inf"))
        new = tl.maximum(top, tl.max(own, 0))
        origin = tl.where(new == float("-inf"), 0.0, new)
        decay = tl.exp2(top - origin)
        weight = tl.exp2(own - origin)
        if C.DIM:
            place = (row * part.splits + split)[:, None] * C.DIM + dims[None, :]
            x = tl.load(part.out + place, mask=(own != float("-inf"))[:, None] & (dims < C.DIM)[None, :], other=0.0)
            acc = acc * decay + tl.sum(weight[:, None] * x, 0)
        total = total * decay + tl.sum(weight, 0)
        top = new
    return acc, top, total


@jit
def join_splits(parts, gates, out, lse, C):
    """The parts of each branch merged, the branches added by gates.  Grid (sequences, heads).

    -> out [S, Hq, DIM], natural-log lse [S, Hq, BRANCHES]. A sink enters here, so once for any number of splits.
    """
    s, h = tl.program_id(0), tl.program_id(1)
    row = s.to(tl.int64) * tl.num_programs(1) + h
    whole = tl.zeros([C.DIM_PADDED], C.ACC)
    acc, top, total = whole, tl.full([], float("-inf"), C.ACC), tl.full([], 0.0, C.ACC)
    for i in tl.static_range(C.PARTS):
        part = parts[i]
        if part.sink is not None:
            acc, top, total = add_sink(acc, top, total, part.sink, h, C)
        acc, top, total = add_splits(acc, top, total, part, row, C)
        if part.LAST:
            origin = tl.where(top == float("-inf"), 0.0, top)
            tl.store(lse + row * C.BRANCHES + part.BRANCH, (origin + tl.log2(total)) * LN2)
            branch = acc / tl.where(total == 0.0, 1.0, total)
            if gates is not None:
                branch *= tl.load(at(gates, s, h, 0).data + part.BRANCH).to(C.ACC)
            whole += branch
            acc, top, total = tl.zeros_like(acc), tl.full([], float("-inf"), C.ACC), tl.full([], 0.0, C.ACC)
    if C.DIM:
        dims = tl.arange(0, C.DIM_PADDED)
        tl.store(out + row * C.DIM + dims, whole.to(out.dtype.element_ty), mask=dims < C.DIM)
