"""Launching the merge of a decode step: what one query got from each kernel -> its result, in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spdsl.runtime.language import tl, triton
from spdsl.runtime.launch.branches import expect_one_dim, merge
from spdsl.runtime.launch.launch import launch, rows_contiguous, strided, uses_kernels
from spdsl.runtime.launch.merging import merge_by_kernel
from spdsl.runtime.tiles.combine import JoinConst, JoinPart, Splits, join_splits

_STEP = 16  # splits that a program loads at once: their latencies overlap
_Whole = tuple[Tensor, Tensor]  # out [B, H, N, D], lse [B, H, N]


def merged_parts(parts: Sequence[Splits | _Whole]) -> _Whole:
    """The exact merge of parts over disjoint keys: out, lse. No gradient."""
    if len(parts) == 1:
        return merged_part(parts[0])
    splits = [part for part in parts if isinstance(part, Splits)]
    if splits:
        out, lse = launch_join([splits], None)
        return out, lse[..., 0]
    pairs = [part for part in parts if not isinstance(part, Splits)]
    return merge_by_kernel(pairs) if uses_kernels(pairs[0][0]) else merge(pairs)


def merged_part(part: Splits | _Whole) -> _Whole:
    """out, lse of one softmax."""
    if not isinstance(part, Splits):
        return part
    out, lse = launch_join([[part]], None)
    return out, lse[..., 0]


def lse_of(part: Splits | _Whole) -> Splits | Tensor:
    """The log-sum-exp [B, H, N] of a softmax; of one query in splits, which whoever reads it merges."""
    return part if isinstance(part, Splits) else part[1]


def merged_lse(lse: Splits | Tensor) -> Tensor:
    """The log-sum-exp alone, [B, H, N]."""
    if not isinstance(lse, Splits):
        return lse
    found = torch.empty(*lse.lse.shape[:2], 1, device=lse.lse.device, dtype=lse.lse.dtype)
    _launch([[lse]], None, None, found)
    return found


def launch_join(branches: Sequence[Sequence[Splits]], gates: Tensor | None) -> _Whole:
    """Branches, each of parts over disjoint keys, and gates [B, H, 1, branches] -> out, and lse [B, H, 1, branches]."""
    expect_one_dim([part.out for branch in branches for part in branch])
    first = branches[0][0]
    batch, heads, _, dim = first.out.shape
    out = torch.empty(batch, heads, 1, dim, device=first.out.device, dtype=first.dtype)
    lse = torch.empty(batch, heads, 1, len(branches), device=first.out.device, dtype=first.lse.dtype)
    _launch(branches, gates, out, lse)
    return out, lse


def _launch(branches: Sequence[Sequence[Splits]], gates: Tensor | None, out: Tensor | None, lse: Tensor) -> None:
    parts = tuple(
        JoinPart(x.out, x.lse, x.sink, x.lse.shape[2], tl.constexpr(i), tl.constexpr(x is branch[-1]))
        for i, branch in enumerate(branches)
        for x in branch
    )
    step = min(_STEP, triton.next_power_of_2(max(x.splits for x in parts)))
    dim = 0 if out is None else out.shape[3]
    acc = tl.float64 if lse.dtype == torch.float64 else tl.float32
    padded = triton.next_power_of_2(max(1, dim))
    values = (len(parts), len(branches), dim, padded, step, acc)
    launch(
        join_splits, tuple(lse.shape[:2]), parts, None if gates is None else strided(rows_contiguous(gates)), out, lse,
        JoinConst(*(tl.constexpr(value) for value in values)),
        num_warps=4 if step * padded > 1024 else 1, num_stages=1,
    )  # fmt: skip
