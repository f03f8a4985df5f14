"""The dense meaning of a softmax in float64: every pair of query and key is tested."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def dense_softmax(
    q: Tensor,
    streams: Sequence[tuple[Tensor, Tensor, Tensor, Tensor | None]],
    scale: float,
    softcap: float | None,
    sink: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """q [B, Hq, N, Dqk] and (k, v, visible, bias) per stream -> out, lse; visible broadcasts to [B, Hq, N, M]."""
    logits, values = [], []
    for k, v, visible, bias in streams:
        group = q.shape[1] // k.shape[1]
        k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
        s = q.double() @ k.transpose(-1, -2) * scale
        s = softcap * torch.tanh(s / softcap) if softcap else s
        s = s if bias is None else s + bias
        logits.append(s.masked_fill(~visible.expand(s.shape), -torch.inf))
        values.append(v)
    # One more column, without value: the sink, or nothing.
    none = q.new_full((1, q.shape[1], 1, 1), -torch.inf, dtype=torch.float64)
    extra = none if sink is None else sink.double().view(1, -1, 1, 1)
    s = torch.cat([*logits, extra.expand(*q.shape[:3], 1)], -1)
    values.append(values[0].new_zeros(*values[0].shape[:2], 1, values[0].shape[3]))
    top = s.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).min)
    weights = torch.exp(s - top)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    out = weights / total.masked_fill(empty, 1.0) @ torch.cat(values, 2)
    lse = (top + torch.log(total.masked_fill(empty, 1.0))).masked_fill(empty, -torch.inf).squeeze(-1)
    return out, lse
