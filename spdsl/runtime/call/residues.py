"""Sets whose keys lie at multiples of one step: the tokens of each residue class as a sequence of their own.

Tokens are reordered by (sequence, position modulo step), so that a class is a run of neighbours and the kernels see
plain windows. Copies of q, k, v and the output cost O(N); tiles that would hold a few visible pairs each are gone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spdsl.runtime.sequences import Layout


class Classes(NamedTuple):
    """The order of all tokens of a batch, flattened [B * N], by class; and the runs [S * step, 2] = (start, count)."""

    order: Tensor
    spans: Tensor


def by_class(
    step: int,
    of_class: Callable[..., tuple[Tensor, Tensor]],
    plain: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    keys: Sequence[Tensor],
    others: Sequence[Tensor],
    layout: Layout,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of `of_class` over the classes; of `plain`, which knows positions, for a part of a longer sequence.

    `keys` are the K and V of the streams, `others` tensors per head.
    """
    if layout.q_offset is not None:
        return plain(q, *keys, *others, *layout)
    rows, columns = _spans(q, layout.q_spans), _spans(keys[0], layout.k_spans)
    of_q = _classes(rows, columns[:, 1] - rows[:, 1], step, q)
    of_k = _classes(columns, torch.zeros_like(columns[:, 1]), step, keys[0])
    others = [x.repeat_interleave(step, 0) if x.dim() > 1 and x.shape[0] > 1 else x for x in others]
    longest = -(-layout.longest // step)
    tokens = keys[0].shape[0] * keys[0].shape[2]
    classes = layout._replace(q_spans=of_q.spans, k_spans=of_k.spans, longest=longest, keys=tokens)
    out, lse = of_class(_packed(q, of_q), *(_packed(x, of_k) for x in keys), *others, *classes)
    back = torch.argsort(of_q.order)
    batch, count = q.shape[0], q.shape[2]
    out, lse = out[0].index_select(1, back), lse[0].index_select(1, back)
    return out.unflatten(1, (batch, count)).transpose(0, 1), lse.unflatten(1, (batch, count)).transpose(0, 1)


def _packed(x: Tensor, classes: Classes) -> Tensor:
    """[B, H, N, D] -> [1, H, B * N, D] in the order of the classes."""
    return x.transpose(0, 1).flatten(1, 2).index_select(1, classes.order).unsqueeze(0)


def _spans(x: Tensor, spans: Tensor | None) -> Tensor:
    """(start, count) of every sequence in the flattened tokens of x [B, H, N, D]."""
    batch, size = x.shape[0], x.shape[2]
    first = torch.arange(batch, device=x.device) * size
    if spans is None:
        return torch.stack([first, torch.full_like(first, size)], 1)
    start = spans[:, 0].long() + (first if batch > 1 else 0)
    return torch.stack([start, spans[:, 1].long()], 1)


def _classes(spans: Tensor, origin: Tensor, step: int, x: Tensor) -> Classes:
    """`origin` [S]: the position of each sequence's first token."""
    token = torch.arange(x.shape[0] * x.shape[2], device=x.device)
    start, count = spans.unbind(1)
    sequence = torch.bucketize(token, start.contiguous(), right=True) - 1
    own = sequence.clamp(min=0)
    step_in = token - start[own]
    inside = (sequence >= 0) & (step_in < count[own])
    remainder = (step_in + origin[own]) % step
    # What belongs to no sequence goes to the end, where no run reaches it.
    order = torch.argsort(torch.where(inside, own * step + remainder, len(start) * step), stable=True)
    last = (origin + count)[:, None] - 1 - torch.arange(step, device=x.device)
    counts = (last // step - (last - count[:, None]) // step).flatten()
    return Classes(order, torch.stack([counts.cumsum(0) - counts, counts], 1).int())
