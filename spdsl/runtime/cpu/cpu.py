"""One softmax over sets of keys on CPU tensors, forward and backward, in time that follows the visited tiles.

The rows of the queries are cut into tiles; `Part.visits` names the key ranges of a tile, the rest is never read. Logits
are `cap(scale * q @ k.T) + bias`; an empty row gives output 0, lse -inf (or the sink) and zero gradients. Two engines
agree: the flash kernel of torch, and plain matrix products for what that kernel lacks (softcap, a gradient of the lse)
and for tiles with NaN or infinity, which must reach only the rows that see them. fp16 and bf16 are computed in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spdsl.runtime.cpu.cpu_threads import PIECES_PER_THREAD, in_order

# Measured on 2 AVX2 cores, window 512, head dim 64: fewer rows spend more on calls and copies, more rows visit keys
# outside the window. The mask at an edge of a window has rows x rows pairs, and torch shares elementwise work among
# threads from 32768 on, which waits for every core. The backward kernel runs one thread per (batch, head), so tiles of
# equal shape share a call.
_TILE_ROWS = 160
_UNITS_PER_CALL = 16  # batch x kv heads x tiles
_KEYS_PER_CALL = 8192  # bounds the memory of the matrix products to rows x keys


class Part(NamedTuple):
    """One stream of the softmax. Rows and keys are token indices; row i has position q_origin + i."""

    k: Tensor  # [B, Hk, M, Dqk]
    v: Tensor  # [B, Hk, M, Dv]
    visits: Callable[[int, int], list[tuple[int, int, bool]]]
    """Rows [first, end) -> disjoint key ranges (first, end, full); full: every row sees every key of it."""
    visible: Callable[[Tensor, Tensor], Tensor]
    """Query positions [rows, 1], key positions [1, keys] -> bool, broadcastable to [B, Hq, rows, keys]."""
    bias: Callable[[Tensor, Tensor], Tensor] | None = None
    """As `visible`, the number added to the logits; no gradient flows into it."""


class Logits(NamedTuple):
    """How a logit follows from a product: cap(scale * q @ k.T), a cap of c being c * tanh(x / c)."""

    scale: float
    softcap: float | None = None
    q_origin: int = 0  # position of the first query


class _TileCall(NamedTuple):
    """The place of one engine call: neighbouring tiles of `rows` rows, each with as many keys."""

    first: int
    rows: int
    keys: int
    ranges: tuple[tuple[tuple[int, int], ...], ...]  # of each tile
    partial: tuple[tuple[tuple[int, int, int], ...], ...]  # of each tile: place among its keys, key range

    @property
    def end(self) -> int:
        return self.first + self.rows * len(self.ranges)


class _TileData(NamedTuple):
    """What an engine computes with; the query heads of a kv head are rows of it."""

    q: Tensor  # [tiles * B, Hk, group * rows, Dqk]
    k: Tensor  # [tiles * B, Hk, keys, Dqk]
    v: Tensor  # [tiles * B, Hk, keys, Dv]
    added: Tensor | None  # to the logits, -inf where hidden: [tiles * B, 1 | Hk, group * rows, keys]
    form: Logits


class _KeyGrads(NamedTuple):
    """What one call adds to the gradients of the keys of a part."""

    part: int
    call: _TileCall
    dk: Tensor  # [tiles * B, Hk, keys, Dqk]
    dv: Tensor  # [tiles * B, Hk, keys, Dv]


def sparse_forward(q: Tensor, parts: Sequence[Part], form: Logits, sink: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention of q [B, Hq, N, Dqk] -> output [B, Hq, N, Dv] in q's dtype, natural-log lse [B, Hq, N].

    The lse is fp32 (fp64 for fp64 inputs). `sink` [Hq] is a logit that enters the denominator only. Query head h
    reads kv head h // (Hq // Hk) of each part.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out, lse = q.new_empty(*q.shape[:3], parts[0].v.shape[3]), q.new_empty(q.shape[:3], dtype=dtype)
    spans = _row_pieces(q, parts)
    sinks = None if sink is None else sink.detach().to(dtype).view(1, -1, 1)

    def run(number: int) -> None:
        first, end = spans[number]
        found = _span_forward(q, parts, form, first, end)
        out[:, :, first:end], lse[:, :, first:end] = found if sinks is None else _with_sink(*found, sinks)

    in_order(len(spans), run, lambda _: None)
    return out, lse


def _span_forward(q: Tensor, parts: Sequence[Part], form: Logits, first: int, end: int) -> tuple[Tensor, Tensor]:
    """Output and lse of rows [first, end) without the sink."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_zeros(*q.shape[:2], end - first, parts[0].v.shape[3], dtype=dtype)
    lse = q.new_full(out.shape[:3], -torch.inf, dtype=dtype)
    engine = _flash_forward if form.softcap is None else _plain_forward
    for part in parts:
        for call in _tile_calls(q, part, first, end):
            tile = _tile_data(q, part, call, form)
            o, s = engine(tile)
            if not o.sum().isfinite():
                o, s = _plain_forward(tile)
            o, s = _unfold_rows(o, call, q), _unfold_rows(s, call, q).squeeze(-1)
            rows = slice(call.first - first, call.end - first)
            _merge_rows(out[:, :, rows], lse[:, :, rows], o, s)
    return out, lse


def _with_sink(out: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    total = torch.logaddexp(lse, sink)
    return out * _share(lse, total).unsqueeze(-1), total


def sparse_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, parts: Sequence[Part], out: Tensor, lse: Tensor, form: Logits
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Gradients dq and (dk, dv) of each part, in the dtypes of the inputs.

    `out` and `lse` are the merged ones of the whole softmax (sink and other parts included); `dlse` may be None.
    """
    dq = torch.empty(q.shape, dtype=q.dtype)
    totals = [tuple(torch.zeros(x.shape, dtype=lse.dtype) for x in part[:2]) for part in parts]
    spans = _row_pieces(q, parts)

    def run(number: int) -> list[_KeyGrads]:
        first, end = spans[number]
        dq[:, :, first:end], found = _span_backward(dout, dlse, q, parts, out, lse, form, first, end)
        return found

    def take(found: list[_KeyGrads]) -> None:
        for grads in found:
            for total, own in zip(totals[grads.part], grads[2:], strict=True):
                _scatter_keys(total, own, grads.call)

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
    engine = _flash_backward if form.softcap is None and dlse is None else _plain_backward
    for number, part in enumerate(parts):
        for call in _tile_calls(q, part, first, end):
            tile = _tile_data(q, part, call, form)
            heads = part.k.shape[1]
            do, o = (_fold_rows(x, call, heads).to(lse.dtype) for x in (dout, out))
            s = _fold_rows(lse.unsqueeze(-1), call, heads)
            s = s.masked_fill(s == -torch.inf, torch.inf)  # an empty row then has exp(logit - lse) = 0
            ds = torch.zeros_like(s) if dlse is None else _fold_rows(dlse.unsqueeze(-1), call, heads).to(lse.dtype)
            grads = engine(tile, do, o, s, ds)
            if not grads[0].sum().isfinite():
                grads = _plain_backward(tile, do, o, s, ds)
            dq[:, :, call.first - first : call.end - first] += _unfold_rows(grads[0], call, q)
            found.append(_KeyGrads(number, call, grads[1], grads[2]))
    return dq, found


def sink_gradient(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, sink: Tensor) -> Tensor:
    """Gradient [Hq] of the sink logit, from the merged output and lse."""
    delta = (dout.to(lse.dtype) * out).sum(-1) - (0.0 if dlse is None else dlse)
    return -(_share(sink.view(1, -1, 1).to(lse.dtype), lse) * delta).sum((0, 2)).to(sink.dtype)


def _row_pieces(q: Tensor, parts: Sequence[Part]) -> list[tuple[int, int]]:
    """Rows [first, end) of the pieces of work: a call's tiles, fewer where threads would have less than four pieces."""
    if not q.shape[0] * q.shape[1]:
        return []
    tiles, threads = -(-q.shape[2] // _TILE_ROWS), torch.get_num_threads()
    joined = max(1, _UNITS_PER_CALL // max(1, q.shape[0] * min(part.k.shape[1] for part in parts)))
    if tiles >= PIECES_PER_THREAD * threads:
        joined = max(1, min(joined, tiles // (2 * PIECES_PER_THREAD * threads)))
    step = joined * _TILE_ROWS
    return [(first, min(first + step, q.shape[2])) for first in range(0, q.shape[2], step)]


def _tile_calls(q: Tensor, part: Part, start: int, stop: int) -> Iterator[_TileCall]:
    """The visited tiles of rows [start, stop); neighbours of equal shape are joined to the units of a call."""
    most = _UNITS_PER_CALL // max(1, part.k.shape[0] * part.k.shape[1])
    held: _TileCall | None = None
    for first in range(start, stop, _TILE_ROWS):
        rows = min(_TILE_ROWS, stop - first)
        for tile in _tile_pieces(first, rows, part.visits(first, first + rows)):
            if held and held.end == first and held[1:3] == tile[1:3] and len(held.ranges) < most:
                held = held._replace(ranges=held.ranges + tile.ranges, partial=held.partial + tile.partial)
                continue
            if held:
                yield held
            held = tile
    if held:
        yield held


def _tile_pieces(first: int, rows: int, visits: list[tuple[int, int, bool]]) -> Iterator[_TileCall]:
    """One tile, as pieces of at most _KEYS_PER_CALL keys; ranges that touch become one."""
    keys, ranges, partial = 0, list[tuple[int, int]](), list[tuple[int, int, int]]()
    for start, end, full in visits:
        while start < end:
            if keys == _KEYS_PER_CALL:
                yield _TileCall(first, rows, keys, (tuple(ranges),), (tuple(partial),))
                keys, ranges, partial = 0, [], []
            cut = min(end, start + _KEYS_PER_CALL - keys)
            if not full:
                partial.append((keys, start, cut))
            touching = ranges and ranges[-1][1] == start
            ranges.append((ranges.pop()[0] if touching else start, cut))
            keys, start = keys + cut - start, cut
    if keys:
        yield _TileCall(first, rows, keys, (tuple(ranges),), (tuple(partial),))


def _gather_keys(x: Tensor, call: _TileCall, dtype: torch.dtype) -> Tensor:
    """[B, H, M, D] -> [tiles * B, H, keys, D]: a view where a single tile has a single range."""
    if len(call.ranges) == len(call.ranges[0]) == 1:
        ((first, end),) = call.ranges[0]
        return x[:, :, first:end].to(dtype)
    tiles = x.new_empty(len(call.ranges), *x.shape[:2], call.keys, x.shape[3], dtype=dtype)
    for tile, place, keys in _places(call):
        tiles[tile, :, :, place] = x[:, :, keys]
    return tiles.flatten(0, 1)


def _scatter_keys(total: Tensor, x: Tensor, call: _TileCall) -> None:
    """Adds [tiles * B, H, keys, D] to the ranges it was gathered from, in a fixed order."""
    tiles = x.unflatten(0, (len(call.ranges), -1))
    for tile, place, keys in _places(call):
        total[:, :, keys] += tiles[tile, :, :, place]


def _places(call: _TileCall) -> Iterator[tuple[int, slice, slice]]:
    """(tile, place among the tile's keys, place among all keys) of each range."""
    for tile, ranges in enumerate(call.ranges):
        at = 0
        for first, end in ranges:
            yield tile, slice(at, at + end - first), slice(first, end)
            at += end - first


def _fold_rows(x: Tensor, call: _TileCall, heads: int) -> Tensor:
    """[B, Hq, N, D] -> [tiles * B, Hk, group * rows, D]: the query heads of a kv head share its keys as more rows."""
    x = x[:, :, call.first : call.end].unflatten(1, (heads, -1)).unflatten(3, (-1, call.rows))
    return x.permute(3, 0, 1, 2, 4, 5).flatten(0, 1).flatten(2, 3)


def _unfold_rows(x: Tensor, call: _TileCall, q: Tensor) -> Tensor:
    """[tiles * B, Hk, group * rows, D] -> [B, Hq, tiles * rows, D]."""
    x = x.unflatten(0, (-1, q.shape[0])).unflatten(3, (-1, call.rows))
    return x.permute(1, 2, 3, 0, 4, 5).flatten(3, 4).flatten(1, 2)


def _tile_data(q: Tensor, part: Part, call: _TileCall, form: Logits) -> _TileData:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = (_gather_keys(x, call, dtype) for x in part[:2])
    added = _added_logits(part, call, q, form.q_origin, dtype) if part.bias or any(call.partial) else None
    return _TileData(_fold_rows(q, call, part.k.shape[1]).to(dtype), k, v, added, form)


def _added_logits(part: Part, call: _TileCall, q: Tensor, q_origin: int, dtype: torch.dtype) -> Tensor:
    """Bias where a pair is visible and -inf elsewhere, folded as the rows."""
    heads, group = part.k.shape[1], q.shape[1] // part.k.shape[1]
    tiles = []
    for tile, (ranges, partial) in enumerate(zip(call.ranges, call.partial, strict=True)):
        start = q_origin + call.first + tile * call.rows
        i = torch.arange(start, start + call.rows).unsqueeze(1)
        hidden = [~part.visible(i, torch.arange(first, end).unsqueeze(0)) for _, first, end in partial]
        added = torch.zeros(1, 1, 1, 1, dtype=dtype)
        if part.bias is not None:
            j = torch.cat([torch.arange(*keys) for keys in ranges]).unsqueeze(0)
            added = added + part.bias(i, j).to(dtype)
        lead = torch.broadcast_shapes(added.shape[:2], *(mask.shape[:-2] for mask in hidden))
        added = added.expand(*lead, call.rows, call.keys).clone(memory_format=torch.contiguous_format)
        for (at, first, end), mask in zip(partial, hidden, strict=True):
            added[..., at : at + end - first].masked_fill_(mask, -torch.inf)
        tiles.append(added.expand(q.shape[0] if len(call.ranges) > 1 else -1, *added.shape[1:]))
    logits = torch.cat(tiles) if len(tiles) > 1 else tiles[0]
    logits = logits.unflatten(1, (heads, group) if logits.shape[1] == heads * group else (1, 1))
    folded: Tensor = logits.expand(-1, -1, group, -1, -1).flatten(2, 3)
    return folded


def _share(part: Tensor, total: Tensor) -> Tensor:
    """The share of the denominator that one of its terms has, 0 for an empty one and of an empty one."""
    share: Tensor = torch.exp(part - total.masked_fill(total == -torch.inf, torch.inf))
    return share.masked_fill(part == -torch.inf, 0.0)


def _merge_rows(out: Tensor, lse: Tensor, o: Tensor, s: Tensor) -> None:
    """Exact combination, in place, of two softmax results over disjoint keys."""
    total = torch.logaddexp(lse, s)
    out.mul_(_share(lse, total).unsqueeze(-1)).addcmul_(o, _share(s, total).unsqueeze(-1))
    lse.copy_(total)


def _flash_forward(x: _TileData) -> tuple[Tensor, Tensor]:
    """Output and lse [.., rows, 1]; columns of zeros change nothing."""
    q, k, v = _for_flash(x.q, x.k, x.v)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = flash(q, k, v, 0.0, False, attn_mask=x.added, scale=x.form.scale)
    lse = lse.unsqueeze(-1)
    if x.added is not None:  # the kernel says 0 for the lse of an empty row
        lse = lse.masked_fill(x.added.amax(-1, keepdim=True) == -torch.inf, -torch.inf)
    return out[..., : x.v.shape[3]], lse


def _flash_backward(x: _TileData, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor) -> tuple[Tensor, ...]:
    dout, q, k, v, out = _for_flash(dout, x.q, x.k, x.v, out)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    found = flash(dout, q, k, v, out, lse.squeeze(-1), 0.0, False, attn_mask=x.added, scale=x.form.scale)
    return tuple(grad[..., : like.shape[3]] for grad, like in zip(found, x[:3], strict=True))


def _for_flash(*tensors: Tensor) -> Iterator[Tensor]:
    """Of one head dim, and with a last stride of 1: the kernel asks for the one and takes the other for granted.

    Only here is that sure: folding, converting and padding each may keep or choose other strides.
    """
    width = max(x.shape[-1] for x in tensors)
    for x in tensors:
        same = x if x.shape[-1] == width else torch.nn.functional.pad(x, (0, width - x.shape[-1]))
        yield same if same.stride(-1) == 1 else same.contiguous()


def _plain_forward(x: _TileData) -> tuple[Tensor, Tensor]:
    scores, _ = _scores(x)
    lse = scores.logsumexp(-1, keepdim=True)
    return _seen_product(_share(scores, lse), x.v), lse


def _plain_backward(x: _TileData, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor) -> tuple[Tensor, ...]:
    scores, slope = _scores(x)
    p = _share(scores, lse)
    dp = dout @ x.v.transpose(2, 3) - ((dout * out).sum(-1, keepdim=True) - dlse)
    ds = (p * dp * slope * x.form.scale).masked_fill(scores == -torch.inf, 0.0)
    return _seen_product(ds, x.k), _seen_product(ds.transpose(2, 3), x.q), _seen_product(p.transpose(2, 3), dout)


def _scores(x: _TileData) -> tuple[Tensor, Tensor | float]:
    """Logits, -inf where hidden whatever the key holds, and the slope of the cap."""
    slope: Tensor | float = 1.0
    scores = (x.q @ x.k.transpose(2, 3)).mul_(x.form.scale)
    if x.form.softcap is not None:
        bent = torch.tanh(scores / x.form.softcap)
        scores, slope = bent * x.form.softcap, 1 - bent * bent
    if x.added is not None:
        scores = (scores + x.added).masked_fill_(x.added == -torch.inf, -torch.inf)
    return scores, slope


def _seen_product(weights: Tensor, x: Tensor) -> Tensor:
    """weights @ x where a weight of 0 hides even NaN and infinity; a row that sees one becomes NaN."""
    if x.sum().isfinite():
        return weights @ x
    odd = ~x.isfinite()
    seen = (weights != 0).to(x.dtype) @ odd.to(x.dtype)
    product: Tensor = weights @ x.masked_fill(odd, 0.0)
    return product.masked_fill(seen > 0, torch.nan)
