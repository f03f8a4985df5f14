"""The gated sum of branches in one pass over their outputs, and its gradient in another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spdsl.runtime.language import tl, triton
from spdsl.runtime.launch.branches import expect_one_dim, gated_sum, stacked_lse
from spdsl.runtime.launch.join import launch_join, merged_parts
from spdsl.runtime.launch.launch import INTERPRETED, launch, rows_contiguous, strided, uses_kernels, wide
from spdsl.runtime.tiles.combine import Splits
from spdsl.runtime.tiles.kernel import jit
from spdsl.runtime.tiles.tiles import at, load_part, store_part, token_pointer


class GateConst(NamedTuple):
    """What the kernels are compiled for (all tl.constexpr)."""

    BRANCHES: tl.constexpr
    ROWS: tl.constexpr  # of a program
    DIM: tl.constexpr
    DIM_PADDED: tl.constexpr  # to a power of two
    ACC: tl.constexpr  # dtype of sums


@jit
def load_gate(gates, row, left, i, C):
    """The gates of branch i, [ROWS]."""
    step = tl.arange(0, C.ROWS)
    pointers = token_pointer(gates, row) + step.to(tl.int64) * gates.token + i
    return tl.load(pointers, mask=step < left, other=0.0).to(C.ACC)


@jit
def gate_rows(parts, gates, out, count, C):
    """out = sum of gate * part, for one tile of rows of one head."""
    row, h, s = tl.program_id(0) * C.ROWS, tl.program_id(1), tl.program_id(2)
    left = count - row
    gates = at(gates, s, h, 0)
    total = tl.zeros((C.ROWS, C.DIM_PADDED), dtype=C.ACC)
    for i in tl.static_range(C.BRANCHES):
        part = at(parts[i], s, h, 0)
        x = load_part(token_pointer(part, row), part.token, left, C.ROWS, 0, C.DIM_PADDED, C.DIM, True)
        total += load_gate(gates, row, left, i, C)[:, None] * x.to(C.ACC)
    out = at(out, s, h, 0)
    store_part(token_pointer(out, row), out.token, left, total, C.ROWS, 0, C.DIM_PADDED, C.DIM)


@jit
def gate_gradients(dout, parts, gates, dparts, dgates, count, C):
    """dpart = gate * dout and dgate = sum(part * dout), for one tile of rows of one head."""
    row, h, s = tl.program_id(0) * C.ROWS, tl.program_id(1), tl.program_id(2)
    left = count - row
    gates = at(gates, s, h, 0)
    dgates = at(dgates, s, h, 0)
    dout = at(dout, s, h, 0)
    d = load_part(token_pointer(dout, row), dout.token, left, C.ROWS, 0, C.DIM_PADDED, C.DIM, True).to(C.ACC)
    step = tl.arange(0, C.ROWS)
    for i in tl.static_range(C.BRANCHES):
        part = at(parts[i], s, h, 0)
        dpart = at(dparts[i], s, h, 0)
        x = load_part(token_pointer(part, row), part.token, left, C.ROWS, 0, C.DIM_PADDED, C.DIM, True)
        own = load_gate(gates, row, left, i, C)[:, None] * d
        store_part(token_pointer(dpart, row), dpart.token, left, own, C.ROWS, 0, C.DIM_PADDED, C.DIM)
        share = tl.sum(x.to(C.ACC) * d, 1).to(dgates.data.dtype.element_ty)
        tl.store(token_pointer(dgates, row) + step.to(tl.int64) * dgates.token + i, share, mask=step < left)


def gate_forward(parts: Sequence[Tensor], gates: Tensor) -> Tensor:
    """Outputs [B, H, N, D] and gates [B, H, N, branches] -> the sum of gate * output, in the dtype of the outputs."""
    expect_one_dim(parts)
    out = torch.empty_like(parts[0], memory_format=torch.contiguous_format)
    grid, C = _gate_launch(parts[0], len(parts))
    own = tuple(strided(rows_contiguous(part)) for part in parts)
    launch(
        gate_rows, grid, own, strided(rows_contiguous(gates)), strided(out), out.shape[2], C, num_warps=4, num_stages=1
    )
    return out


def gate_backward(dout: Tensor, parts: Sequence[Tensor], gates: Tensor) -> list[Tensor]:
    """-> the gradients of the outputs, then that of the gates"""
    dparts = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in parts]
    dgates = torch.empty_like(gates, memory_format=torch.contiguous_format)
    grid, C = _gate_launch(dout, len(parts))
    launch(
        gate_gradients, grid, strided(rows_contiguous(dout)), tuple(strided(rows_contiguous(part)) for part in parts),
        strided(rows_contiguous(gates)), tuple(strided(part) for part in dparts), strided(dgates), dout.shape[2], C,
        num_warps=4, num_stages=1,
    )  # fmt: skip
    return [*dparts, dgates]


def gated(branches: Sequence[Sequence[Splits | tuple[Tensor, Tensor]]], gates: Tensor) -> tuple[Tensor, Tensor]:
    """The same of a call with a cache: each branch the merge of its parts; and the lse of every branch."""
    splits = [[part for part in branch if isinstance(part, Splits)] for branch in branches]
    if splits[0]:
        return launch_join(splits, gates)
    parts = [merged_parts(branch) for branch in branches]
    if not uses_kernels(gates):
        return gated_sum(parts, gates)
    return gate_forward([out for out, _ in parts], gates), stacked_lse(parts)


def _gate_launch(x: Tensor, branches: int) -> tuple[tuple[int, int, int], GateConst]:
    rows = 16 if INTERPRETED or branches > 3 else 32  # a thread holds all branches at once
    acc = tl.float64 if wide(x.dtype) == torch.float64 else tl.float32
    values = (branches, rows, x.shape[3], max(16, triton.next_power_of_2(x.shape[3])), acc)
    grid = (triton.cdiv(x.shape[2], rows), x.shape[1], x.shape[0])
    return grid, GateConst(*(tl.constexpr(value) for value in values))
