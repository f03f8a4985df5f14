"""The exact merge of whole parts in one pass over their outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spdsl.runtime.language import tl, triton
from spdsl.runtime.launch.branches import expect_one_dim
from spdsl.runtime.launch.launch import INTERPRETED, launch, rows_contiguous, strided, wide
from spdsl.runtime.tiles.kernel import LN2, LOG2E, jit
from spdsl.runtime.tiles.tiles import at, load_part, load_row_values, store_part, store_row_values, token_pointer


class MergeConst(NamedTuple):
    """What the kernel is compiled for (all tl.constexpr)."""

    PARTS: tl.constexpr
    BLOCK_M: tl.constexpr  # rows of a program
    DIM: tl.constexpr
    DIM_PADDED: tl.constexpr  # to a power of two
    ACC: tl.constexpr  # dtype of sums


@jit
def merge_rows(parts, lses, out, lse, count, C):
    """out = sum of exp(own lse - lse) * part, for one tile of rows of one head; lse is that of all parts."""
    row, h, s = tl.program_id(0) * C.BLOCK_M, tl.program_id(1), tl.program_id(2)
    left = count - row
    top = tl.full((C.BLOCK_M,), float("-inf"), C.ACC)
    for i in tl.static_range(C.PARTS):
        top = tl.maximum(top, load_row_values(at(lses[i], s, h, 0), row, left, float("-inf"), C) * LOG2E)
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros((C.BLOCK_M,), dtype=C.ACC)
    acc = tl.zeros((C.BLOCK_M, C.DIM_PADDED), dtype=C.ACC)
    for i in tl.static_range(C.PARTS):
        weight = tl.exp2(load_row_values(at(lses[i], s, h, 0), row, left, float("-inf"), C) * LOG2E - shift)
        part = at(parts[i], s, h, 0)
        x = load_part(token_pointer(part, row), part.token, left, C.BLOCK_M, 0, C.DIM_PADDED, C.DIM, True)
        acc += weight[:, None] * x.to(C.ACC)
        total += weight
    out = at(out, s, h, 0)
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    store_part(token_pointer(out, row), out.token, left, acc, C.BLOCK_M, 0, C.DIM_PADDED, C.DIM)
    store_row_values(at(lse, s, h, 0), row, left, (top + tl.log2(total)) * LN2, C)


def merge_by_kernel(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(out [B, H, N, D], lse [B, H, N]) of disjoint keys -> those of one softmax over all of them."""
    expect_one_dim([out for out, _ in parts])
    first, first_lse = parts[0]
    out = torch.empty_like(first, memory_format=torch.contiguous_format)
    lse = torch.empty_like(first_lse, memory_format=torch.contiguous_format)
    rows, dim = 16 if INTERPRETED else 32, first.shape[3]
    acc = tl.float64 if wide(first.dtype) == torch.float64 else tl.float32
    values = (len(parts), rows, dim, max(16, triton.next_power_of_2(dim)), acc)
    launch(
        merge_rows, (triton.cdiv(first.shape[2], rows), first.shape[1], first.shape[0]),
        tuple(strided(rows_contiguous(x)) for x, _ in parts), tuple(strided(x) for _, x in parts),
        strided(out), strided(lse), first.shape[2], MergeConst(*(tl.constexpr(value) for value in values)),
        num_warps=4, num_stages=1,
    )  # fmt: skip
    return out, lse
