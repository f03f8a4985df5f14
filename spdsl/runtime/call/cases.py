"""Results that depend on the length or on scalars: per request where only the device knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spdsl.runtime.launch.launch import uses_kernels
from spdsl.runtime.sequences import Layout, on_host


def known(condition: object) -> bool | None:
    """Whether a condition holds, as far as the host may look: at numbers, and at one for all on CPU tensors."""
    if not isinstance(condition, Tensor):
        return True if condition else False  # noqa: SIM210 (torch.compile keeps bool(..) as a symbol)
    looks = condition.numel() == 1 and on_host(condition) and not uses_kernels(condition)
    return bool(condition) if looks else None


def settle(
    pending: Sequence[tuple[Tensor, tuple[Tensor, Tensor]]], last: tuple[Tensor, Tensor], layout: Layout, rows: int
) -> tuple[Tensor, Tensor]:
    """For each sequence the first pending result whose condition [S] holds, else the last one.

    Where one is gated, every lse has a column for each branch: one that is not repeats its own.
    """
    out, lse = last
    gated = any(own.dim() == 4 for _, (_, own) in pending) or lse.dim() == 4
    lse = lse[..., None] if gated and lse.dim() == 3 else lse
    for condition, (own_out, own_lse) in reversed(pending):
        holds = _per_row(condition, layout, rows, out.shape[0])
        own_lse = own_lse[..., None] if gated and own_lse.dim() == 3 else own_lse
        out = torch.where(holds[..., None], own_out, out)
        lse = torch.where(holds[..., None] if gated else holds, own_lse, lse)
    return out, lse


def _per_row(condition: Tensor, layout: Layout, rows: int, batch: int) -> Tensor:
    """[S] or [] -> [batch or 1, 1, rows or 1]; packed sequences spread over their tokens."""
    condition = condition.reshape(-1, 1, 1)
    packed = layout.q_spans is not None and layout.q_spans.shape[0] > 1 and condition.shape[0] > 1
    if layout.q_spans is None or not packed or batch > 1:  # every sequence has a batch row of its own
        return condition
    ends = (layout.q_spans[:, 0] + layout.q_spans[:, 1]).contiguous()
    sequence = torch.bucketize(torch.arange(rows, device=ends.device), ends, right=True).clamp(max=len(ends) - 1)
    return condition[sequence].view(1, 1, rows)


def finish(part: tuple[Tensor, Tensor], return_lse: bool) -> Any:
    """What a call gives of one result: out, or (out, lse)."""
    return part if return_lse else part[0]
