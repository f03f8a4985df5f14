"""One softmax over sets of keys on CPU tensors, forward and backward, in time that follows the visited tiles.

The rows of the queries are cut into tiles; `Part.visits` names the key ranges of a tile, the rest is never read. Logits
are `cap(scale * q @ k.T) + bias`; an empty row gives output 0, lse -inf (or the sink) and zero gradients. fp16 and
bf16 are computed in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spdsl.runtime.cpu.cpu_engines import (
    flash_backward,
    flash_forward,
    plain_backward,
    plain_forward,
    share_of,
    with_sink,
)
from spdsl.runtime.cpu.cpu_threads import in_order
from spdsl.runtime.cpu.cpu_tiles import (
    Logits,
    Part,
    TileCall,
    fold_rows,
    row_pieces,
    scatter_keys,
    tile_calls,
    tile_data,
    unfold_rows,
)


class _KeyGrads(NamedTuple):
    """What one call adds to the gradients of the keys of a part."""

    part: int
    call: TileCall
    dk: Tensor  # [tiles * B, Hk, keys, Dqk]
    dv: Tensor  # [tiles * B, Hk, keys, Dv]


def sparse_forward(q: Tensor, parts: Sequence[Part], form: Logits, sink: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention of q [B, Hq, N, Dqk] -> output [B, Hq, N, Dv] in q's dtype, natural-log lse [B, Hq, N].

    The lse is fp32 (fp64 for fp64 inputs). `sink` [Hq] is a logit that enters the denominator only. Query head h
    reads kv head h // (Hq // Hk) of each part.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out, lse = q.new_empty(*q.shape[:3], parts[0].v.shape[3]), q.new_empty(q.shape[:3], dtype=dtype)
    spans = row_pieces(q, parts)
    sinks = None if sink is None else sink.detach().to(dtype).view(1, -1, 1)

    def run(number: int) -> None:
        first, end = spans[number]
        found = _span_forward(q, parts, form, first, end)
        out[:, :, first:end], lse[:, :, first:end] = found if sinks is None else with_sink(*found, sinks)

    in_order(len(spans), run, lambda _: None)
    return out, lse


def _span_forward(q: Tensor, parts: Sequence[Part], form: Logits, first: int, end: int) -> tuple[Tensor, Tensor]:
    """Output and lse of rows [first, end) without the sink."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_zeros(*q.shape[:2], end - first, parts[0].v.shape[3], dtype=dtype)
    lse = q.new_full(out.shape[:3], -torch.inf, dtype=dtype)
    engine = flash_forward if form.softcap is None else plain_forward
    for part in parts:
        for call in tile_calls(q, part, first, end):
            tile = tile_data(q, part, call, form)
            o, s = engine(tile)
            if not o.sum().isfinite():
                o, s = plain_forward(tile)
            o, s = unfold_rows(o, call, q), unfold_rows(s, call, q).squeeze(-1)
            rows = slice(call.first - first, call.end - first)
            merge_into_rows(out[:, :, rows], lse[:, :, rows], o, s)
    return out, lse


def sparse_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, parts: Sequence[Part], out: Tensor, lse: Tensor, form: Logits
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Gradients dq and (dk, dv) of each part, in the dtypes of the inputs.

    `out` and `lse` are the merged ones of the whole softmax (sink and other parts included); `dlse` may be None.
    """
    dq = torch.empty(q.shape, dtype=q.dtype)
    totals = [tuple(torch.zeros(x.shape, dtype=lse.dtype) for x in part[:2]) for part in parts]
    spans = row_pieces(q, parts)

    def run(number: int) -> list[_KeyGrads]:
        first, end = spans[number]
        dq[:, :, first:end], found = _span_backward(dout, dlse, q, parts, out, lse, form, first, end)
        return found

    def take(found: list[_KeyGrads]) -> None:
        for grads in found:
            for total, own in zip(totals[grads.part], grads[2:], strict=True):
                scatter_keys(total, own, grads.call)

    in_order(len(spans), run, take)
    return dq, [(dk.to(part.k.dtype), dv.to(part.v.dtype)) for (dk, dv), part in zip(totals, parts, strict=True)]


def _span_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    parts: Sequence[Part],
    out: Tensor,
    lse: Tensor,
    form: Logits,
    first: int,
    end: int,
) -> tuple[Tensor, list[_KeyGrads]]:
    """dq of rows [first, end), and what they add to the gradients of the keys."""
    dq, found = torch.zeros(*q.shape[:2], end - first, q.shape[3], dtype=lse.dtype), list[_KeyGrads]()
    engine = flash_backward if form.softcap is None and dlse is None else plain_backward
    for number, part in enumerate(parts):
        for call in tile_calls(q, part, first, end):
            tile = tile_data(q, part, call, form)
            heads = part.k.shape[1]
            do, o = (fold_rows(x, call, heads).to(lse.dtype) for x in (dout, out))
            s = fold_rows(lse.unsqueeze(-1), call, heads)
            s = s.masked_fill(s == -torch.inf, torch.inf)  # an empty row then has exp(logit - lse) = 0
            ds = torch.zeros_like(s) if dlse is None else fold_rows(dlse.unsqueeze(-1), call, heads).to(lse.dtype)
            grads = engine(tile, do, o, s, ds)
            if not grads[0].sum().isfinite():
                grads = plain_backward(tile, do, o, s, ds)
            dq[:, :, call.first - first : call.end - first] += unfold_rows(grads[0], call, q)
            found.append(_KeyGrads(number, call, grads[1], grads[2]))
    return dq, found


def sink_gradient(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, sink: Tensor) -> Tensor:
    """Gradient [Hq] of the sink logit, from the merged output and lse."""
    delta = (dout.to(lse.dtype) * out).sum(-1) - (0.0 if dlse is None else dlse)
    return -(share_of(sink.view(1, -1, 1).to(lse.dtype), lse) * delta).sum((0, 2)).to(sink.dtype)


def merge_into_rows(out: Tensor, lse: Tensor, o: Tensor, s: Tensor) -> None:
    """Exact combination, in place, of two softmax results over disjoint keys."""
    total = torch.logaddexp(lse, s)
    out.mul_(share_of(lse, total).unsqueeze(-1)).addcmul_(o, share_of(s, total).unsqueeze(-1))
    lse.copy_(total)
