"""A softmax that skips tiles on CPU tensors: tile after tile of rows, over the keys in their order.

The logits of all that a tile of rows visits are made, then it votes; values are read, and multiplied, of the tiles of
keys that some head keeps. The backward reads what the forward noted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spdsl.runtime.cpu.cpu import merge_into_rows
from spdsl.runtime.cpu.cpu_engines import plain_backward, scores_of, seen_product, share_of, with_sink
from spdsl.runtime.cpu.cpu_threads import in_order
from spdsl.runtime.cpu.cpu_tiles import (
    Logits,
    Part,
    TileCall,
    TileData,
    fold_rows,
    scatter_keys,
    tile_data,
    unfold_rows,
)
from spdsl.runtime.skip.notes import bits_of, noted
from spdsl.runtime.skip.rule import Running, SkipRule, greatest, seen_by_voters, vote

_KEYS_AT_ONCE = 8192  # bounds the memory of the logits of a tile of rows


class Skipped(NamedTuple):
    """What a call knows of the skip of one sequence: room [B or 1, Hq or 1, 1], the position of key 0, its slots."""

    rule: SkipRule
    room: Tensor
    k_origin: int
    notes: Tensor  # [B, Hq, slots, 2 + words], from the slot of the first row on


def skip_forward(
    q: Tensor, part: Part, form: Logits, skipped: Skipped, sink: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `sparse_forward`, over the tiles that are kept, which it notes."""
    dtype = skipped.room.dtype
    out, lse = q.new_empty(*q.shape[:3], part.v.shape[3]), q.new_empty(q.shape[:3], dtype=dtype)
    sinks = None if sink is None else sink.detach().to(dtype).view(1, -1, 1)
    spans = spans_of_tiles(form.q_origin, q.shape[2], skipped.rule.rows)

    def run(slot: int) -> None:
        first, end = spans[slot]
        found = _rows_forward(q, part, form, skipped, slot, first, end)
        out[:, :, first:end], lse[:, :, first:end] = found if sinks is None else with_sink(*found, sinks)

    in_order(len(spans), run, lambda _: None)
    return out, lse


def skip_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, part: Part, out: Tensor, lse: Tensor, form: Logits, skipped: Skipped
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """As `sparse_backward`, over the tiles that were noted."""
    dq = torch.empty(q.shape, dtype=q.dtype)
    totals = [torch.zeros(x.shape, dtype=lse.dtype) for x in part[:2]]
    spans = spans_of_tiles(form.q_origin, q.shape[2], skipped.rule.rows)

    def run(slot: int) -> list[tuple[TileCall, Tensor, Tensor]]:
        first, end = spans[slot]
        rows, found = torch.zeros(*q.shape[:2], end - first, q.shape[3], dtype=lse.dtype), []
        kept = bits_of(skipped.notes[:, :, slot], -(-part.k.shape[2] // skipped.rule.unit))
        numbers = kept.flatten(0, 1).any(0).nonzero().flatten().tolist()
        for call in _calls(first, end, numbers, skipped.rule.unit, part.k.shape[2]):
            tile = _with_dropped(tile_data(q, part, call, form), call, kept, q, skipped.rule.unit)
            heads = part.k.shape[1]
            do, o = (fold_rows(x, call, heads).to(lse.dtype) for x in (dout, out))
            s = fold_rows(lse.unsqueeze(-1), call, heads)
            s = s.masked_fill(s == -torch.inf, torch.inf)
            ds = torch.zeros_like(s) if dlse is None else fold_rows(dlse.unsqueeze(-1), call, heads).to(lse.dtype)
            own, dk, dv = plain_backward(tile, do, o, s, ds)
            rows += unfold_rows(own, call, q)
            found.append((call, dk, dv))
        dq[:, :, first:end] = rows
        return found

    def take(found: list[tuple[TileCall, Tensor, Tensor]]) -> None:
        for call, *grads in found:
            for total, own in zip(totals, grads, strict=True):
                scatter_keys(total, own, call)

    in_order(len(spans), run, take)
    return dq, [(totals[0].to(part.k.dtype), totals[1].to(part.v.dtype))]


def _rows_forward(
    q: Tensor, part: Part, form: Logits, skipped: Skipped, slot: int, first: int, end: int
) -> tuple[Tensor, Tensor]:
    """Output and lse of rows [first, end) without the sink; their notes are written."""
    rule, dtype, keys = skipped.rule, skipped.room.dtype, part.k.shape[2]
    out = q.new_zeros(*q.shape[:2], end - first, part.v.shape[3], dtype=dtype)
    lse = q.new_full(out.shape[:3], -torch.inf, dtype=dtype)
    running = Running(torch.full_like(lse, -torch.inf))
    numbers, kept, seen = list[int](), list[Tensor](), list[Tensor]()
    visited = sorted({x for a, b, _ in part.visits(first, end) for x in range(a // rule.unit, -(-b // rule.unit))})
    for call in _calls(first, end, visited, rule.unit, keys):
        tile = tile_data(q, part, call, form)
        logits = unfold_rows(scores_of(tile)[0], call, q)
        tops = greatest(logits, rule.unit)
        own = [x // rule.unit for a, b in call.ranges[0] for x in range(a, b, rule.unit)]
        positions = [x + skipped.k_origin // rule.unit for x in own]
        keeps, running = vote(rule, tops, skipped.room, positions, running, part.k.shape[1])
        numbers, kept, seen = [*numbers, *own], [*kept, keeps], [*seen, seen_by_voters(rule, tops, part.k.shape[1])]
        if keeps.any():
            _merge_kept(out, lse, logits, keeps, tile, call, q, rule.unit)
    if numbers:
        notes = noted(torch.cat(kept, -1), torch.cat(seen, -1), torch.tensor(numbers), skipped.notes.shape[3])
        skipped.notes[:, :, slot] = notes
    return out, lse


def _merge_kept(
    out: Tensor, lse: Tensor, logits: Tensor, keeps: Tensor, tile: TileData, call: TileCall, q: Tensor, unit: int
) -> None:
    """Adds what is kept of a call to out and lse of its rows. Values of other tiles are not touched."""
    columns = keeps.flatten(0, 1).any(0).repeat_interleave(unit)[: call.keys]
    chosen = keeps.repeat_interleave(unit, -1)[..., : call.keys]
    scores = logits.masked_fill(~chosen.unsqueeze(2), -torch.inf)[..., columns]
    top = scores.logsumexp(-1, keepdim=True)
    weights = fold_rows(share_of(scores, top), call._replace(first=0), tile.k.shape[1])
    merge_into_rows(out, lse, unfold_rows(seen_product(weights, tile.v[:, :, columns]), call, q), top.squeeze(-1))


def spans_of_tiles(q_origin: int, rows: int, size: int) -> list[tuple[int, int]]:
    """Rows [first, end) of each tile, whose bounds are positions that `size` divides."""
    starts = range(-(q_origin % size), rows, size)
    return [(max(0, first), min(first + size, rows)) for first in starts]


def _calls(first: int, end: int, tiles: Sequence[int], unit: int, keys: int) -> Iterator[TileCall]:
    """The tiles of keys that rows [first, end) meet, as many at once as memory allows; every pair is tested."""
    step = max(1, _KEYS_AT_ONCE // unit)
    for at in range(0, len(tiles), step):
        ranges, partial, count = list[tuple[int, int]](), list[tuple[int, int, int]](), 0
        for tile in tiles[at : at + step]:
            start, stop = tile * unit, min((tile + 1) * unit, keys)
            partial.append((count, start, stop))
            count += stop - start
            touching = ranges and ranges[-1][1] == start
            ranges.append((ranges.pop()[0] if touching else start, stop))
        yield TileCall(first, end - first, count, (tuple(ranges),), (tuple(partial),))


def _with_dropped(tile: TileData, call: TileCall, kept: Tensor, q: Tensor, unit: int) -> TileData:
    """Hides what a head has dropped and another keeps."""
    columns = torch.cat([torch.arange(*keys) for keys in call.ranges[0]]) // unit
    chosen = kept[..., columns].unsqueeze(2).expand(*q.shape[:2], call.rows, call.keys)
    folded = fold_rows(chosen, call._replace(first=0), tile.k.shape[1])
    assert tile.added is not None
    return tile._replace(added=tile.added.expand(folded.shape).masked_fill(~folded, -torch.inf))
