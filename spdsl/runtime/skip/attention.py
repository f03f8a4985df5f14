"""One softmax that skips tiles, without kernels: on the CPU path, over a cache, and as the float64 meaning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from spdsl.runtime.cache.storage import Storage
from spdsl.runtime.call.reference import dense_softmax
from spdsl.runtime.cpu.attention import Form, KeyValues, logits_of, streams_of
from spdsl.runtime.launch.launch import empty_rows, gradient_room
from spdsl.runtime.sequences import Corner, Layout
from spdsl.runtime.skip.cpu_skip import Skipped, skip_backward, skip_forward, spans_of_tiles
from spdsl.runtime.skip.notes import bits_of, first_slot, most_keys_of, note_room, noted
from spdsl.runtime.skip.rule import Running, SkipRule, expect_whole_tiles, greatest, seen_by_voters, vote


def cpu_skip_forward(
    form: Form, q: Tensor, keys: KeyValues, layout: Layout, sink: Tensor | None, t: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    """-> out, lse, notes of the tiles that were kept; rows in no sequence keep out = 0, lse = -inf."""
    rule = _rule(form, layout)
    notes = note_room(q, layout, rule.rows, rule.unit, most_keys_of(layout))
    out, lse = empty_rows(q, keys[0][1].shape[3])
    for corner, skipped in _sequences(form, rule, q, layout, t, notes, lse):
        rows, columns = (corner.batch, slice(None), corner.rows), (corner.batch, slice(None), corner.keys)
        here = [(k[columns], v[columns]) for k, v in keys]
        (part,) = streams_of(form, q.shape[1], here, corner, form.own(t, corner, layout))
        out[rows], lse[rows] = skip_forward(q[rows], part, form.logits(q, corner), skipped, sink)
    return out, lse, notes


def cpu_skip_backward(
    form: Form, dout: Tensor, dlse: Tensor | None, q: Tensor, keys: KeyValues, out: Tensor, lse: Tensor, notes: Tensor,
    layout: Layout, t: Any = None,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:  # fmt: skip
    """-> dq, (dk, dv): the gradient over the tiles that were noted."""
    rule = _rule(form, layout)
    dq, grads = gradient_room(q, keys)
    for corner, skipped in _sequences(form, rule, q, layout, t, notes, lse):
        rows, columns = (corner.batch, slice(None), corner.rows), (corner.batch, slice(None), corner.keys)
        here = [(k[columns], v[columns]) for k, v in keys]
        (part,) = streams_of(form, q.shape[1], here, corner, form.own(t, corner, layout))
        given = (dout[rows], None if dlse is None else dlse[rows], q[rows], part, out[rows], lse[rows])
        dq[rows], [(own_dk, own_dv)] = skip_backward(*given, form.logits(q, corner), skipped)
        grads[0][0][columns], grads[0][1][columns] = own_dk, own_dv
    return dq, grads


def cached_skip(
    form: Form, q: Tensor, keys: KeyValues, held: Storage, layout: Layout, sink: Tensor | None, t: Any = None
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """New queries over the keys in a cache, or in pages: (out, lse), notes."""
    rule = _rule(form, layout)
    notes = note_room(q, layout, rule.rows, rule.unit, layout.keys)
    out, lse = empty_rows(q, keys[0][1].shape[3])
    for corner, skipped in _sequences(form, rule, q, layout, t, notes, lse):
        s, rows = corner.sequences.start, (corner.batch, slice(None), corner.rows)
        here = [(held.rows(k, s, corner.length), held.rows(v, s, corner.length)) for k, v in keys]
        (part,) = streams_of(form, q.shape[1], here, corner, form.own(t, corner, layout))
        out[rows], lse[rows] = skip_forward(q[rows], part, form.logits(q, corner), skipped, sink)
    return (out, lse), notes


def dense_skip(
    form: Form, q: Tensor, keys: KeyValues, layout: Layout, sink: Tensor | None, t: Any = None,
    notes: Tensor | None = None,
) -> tuple[tuple[Tensor, Tensor], Tensor]:  # fmt: skip
    """The meaning in float64: (out, lse), notes. Every pair of query and key is tested; notes: the tiles to keep."""
    rule, given = _rule(form, layout), notes
    notes = note_room(q, layout, rule.rows, rule.unit, most_keys_of(layout)) if given is None else given
    out = q.new_zeros(*q.shape[:3], keys[0][1].shape[3], dtype=torch.float64)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=torch.float64)
    for corner, skipped in _sequences(form, rule, q, layout, t, notes, lse):
        rows, columns = (corner.batch, slice(None), corner.rows), (corner.batch, slice(None), corner.keys)
        k, v = (x[columns] for x in keys[0])
        asking, own = q[rows].double(), form.own(t, corner, layout)
        q_at = (corner.q_origin + torch.arange(asking.shape[2], device=q.device)).view(1, 1, -1, 1)
        k_at = (corner.k_origin + torch.arange(k.shape[2], device=q.device)).view(1, 1, 1, -1)
        place = (q_at, k_at, torch.arange(q.shape[1], device=q.device).view(1, -1, 1, 1), corner.length, *own)
        seen = form.sweeps[0].mask(*place).expand(*asking.shape[:3], k.shape[2])
        if given is None:
            with torch.no_grad():
                logits = logits_of(form, asking, k.double(), corner, own)(0, asking.shape[2])
                _note_dense(skipped, logits, corner.q_origin, k.shape[1])
        tile = (q_at.flatten() // rule.rows) - corner.q_origin // rule.rows
        kept = bits_of(skipped.notes[:, :, tile], -(-k.shape[2] // rule.unit))
        kept = kept.repeat_interleave(rule.unit, -1)[..., : k.shape[2]]
        bias = None if form.bias is None else form.bias(*place)
        stream = (k.double(), v, seen & kept, bias)
        out[rows], lse[rows] = dense_softmax(asking, [stream], form.scale_of(q, corner), form.softcap, sink)
    return (out, lse), notes


def _note_dense(skipped: Skipped, logits: Tensor, q_origin: int, kv_heads: int) -> None:
    """Notes what a whole sequence keeps."""
    rule = skipped.rule
    first = skipped.k_origin // rule.unit
    for slot, (begin, end) in enumerate(spans_of_tiles(q_origin, logits.shape[2], rule.rows)):
        tops = greatest(logits[:, :, begin:end], rule.unit)
        tiles = range(first, first + tops.shape[-1])
        running = Running(torch.full_like(tops[..., 0], -torch.inf))
        kept, _ = vote(rule, tops, skipped.room, tiles, running, kv_heads)
        numbers = torch.arange(tops.shape[-1], device=logits.device)
        skipped.notes[:, :, slot] = noted(kept, seen_by_voters(rule, tops, kv_heads), numbers, skipped.notes.shape[3])


def _rule(form: Form, layout: Layout) -> SkipRule:
    assert form.skip is not None
    expect_whole_tiles(layout, form.skip.unit)
    return form.skip


def _sequences(
    form: Form, rule: SkipRule, q: Tensor, layout: Layout, t: Any, notes: Tensor, like: Tensor
) -> Iterator[tuple[Corner, Skipped]]:
    """Those of a call that have rows."""
    for corner in form.corners(q, layout):
        if corner.rows.start < corner.rows.stop:
            room = rule.room(q.shape[1], max(1, corner.length), form.own(t, corner, layout), like)
            own = notes[corner.batch, :, first_slot(corner, layout, rule.rows) :]
            yield corner, Skipped(rule, room, corner.k_origin, own)
