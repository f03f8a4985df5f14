"""The tiles of rows of one softmax on CPU tensors: which keys each visits, and what an engine gets of them.

Neighbouring tiles of as many keys share a call of an engine. The query heads of a kv head are rows of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from spdsl.runtime.cpu.cpu_threads import PIECES_PER_THREAD

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
    rows: int = 0
    """Of a tile, where its sets tell; 0: as many as usual."""
    before: int = 0
    """Rows of the first tile that lie before the call."""

    def edges(self, start: int, stop: int) -> list[int]:
        """Where the tiles of rows [start, stop) begin, and where the last one ends."""
        step = self.rows or _TILE_ROWS
        first = start + step - (start + self.before) % step
        return [start, *range(first, stop, step), stop] if start < stop else [start]


class Logits(NamedTuple):
    """How a logit follows from a product: cap(scale * q @ k.T), a cap of c being c * tanh(x / c)."""

    scale: float
    softcap: float | None = None
    q_origin: int = 0  # position of the first query


class TileCall(NamedTuple):
    """The place of one engine call: neighbouring tiles of `rows` rows, each with as many keys."""

    first: int
    rows: int
    keys: int
    ranges: tuple[tuple[tuple[int, int], ...], ...]  # of each tile
    partial: tuple[tuple[tuple[int, int, int], ...], ...]  # of each tile: place among its keys, key range

    @property
    def end(self) -> int:
        return self.first + self.rows * len(self.ranges)


class TileData(NamedTuple):
    """What an engine computes with; the query heads of a kv head are rows of it."""

    q: Tensor  # [tiles * B, Hk, group * rows, Dqk]
    k: Tensor  # [tiles * B, Hk, keys, Dqk]
    v: Tensor  # [tiles * B, Hk, keys, Dv]
    added: Tensor | None  # to the logits, -inf where hidden: [tiles * B, 1 | Hk, group * rows, keys]
    form: Logits


def row_pieces(q: Tensor, parts: Sequence[Part]) -> list[tuple[int, int]]:
    """Rows [first, end) of the pieces of work: a call's tiles, fewer where threads would have less than four pieces."""
    if not q.shape[0] * q.shape[1]:
        return []
    edges, threads = parts[0].edges(0, q.shape[2]), torch.get_num_threads()
    tiles = len(edges) - 1
    joined = max(1, _UNITS_PER_CALL // max(1, q.shape[0] * min(part.k.shape[1] for part in parts)))
    if tiles >= PIECES_PER_THREAD * threads:
        joined = max(1, min(joined, tiles // (2 * PIECES_PER_THREAD * threads)))
    ends = [*edges[joined:-1:joined], edges[-1]]
    return list(pairwise([0, *ends])) if tiles else []


def tile_calls(q: Tensor, part: Part, start: int, stop: int) -> Iterator[TileCall]:
    """The visited tiles of rows [start, stop); neighbours of equal shape are joined to the units of a call."""
    most = _UNITS_PER_CALL // max(1, part.k.shape[0] * part.k.shape[1])
    held: TileCall | None = None
    for first, end in pairwise(part.edges(start, stop)):
        rows = end - first
        for tile in _tile_pieces(first, rows, part.visits(first, first + rows)):
            if held and held.end == first and held[1:3] == tile[1:3] and len(held.ranges) < most:
                held = held._replace(ranges=held.ranges + tile.ranges, partial=held.partial + tile.partial)
                continue
            if held:
                yield held
            held = tile
    if held:
        yield held


def _tile_pieces(first: int, rows: int, visits: list[tuple[int, int, bool]]) -> Iterator[TileCall]:
    """One tile, as pieces of at most _KEYS_PER_CALL keys; ranges that touch become one."""
    keys, ranges, partial = 0, list[tuple[int, int]](), list[tuple[int, int, int]]()
    for start, end, full in visits:
        while start < end:
            if keys == _KEYS_PER_CALL:
                yield TileCall(first, rows, keys, (tuple(ranges),), (tuple(partial),))
                keys, ranges, partial = 0, [], []
            cut = min(end, start + _KEYS_PER_CALL - keys)
            if not full:
                partial.append((keys, start, cut))
            touching = ranges and ranges[-1][1] == start
            ranges.append((ranges.pop()[0] if touching else start, cut))
            keys, start = keys + cut - start, cut
    if keys:
        yield TileCall(first, rows, keys, (tuple(ranges),), (tuple(partial),))


def _gather_keys(x: Tensor, call: TileCall, dtype: torch.dtype) -> Tensor:
    """[B, H, M, D] -> [tiles * B, H, keys, D]: a view where a single tile has a single range."""
    if len(call.ranges) == len(call.ranges[0]) == 1:
        ((first, end),) = call.ranges[0]
        return x[:, :, first:end].to(dtype)
    tiles = x.new_empty(len(call.ranges), *x.shape[:2], call.keys, x.shape[3], dtype=dtype)
    for tile, place, keys in _places(call):
        tiles[tile, :, :, place] = x[:, :, keys]
    return tiles.flatten(0, 1)


def scatter_keys(total: Tensor, x: Tensor, call: TileCall) -> None:
    """Adds [tiles * B, H, keys, D] to the ranges it was gathered from, in a fixed order."""
    tiles = x.unflatten(0, (len(call.ranges), -1))
    for tile, place, keys in _places(call):
        total[:, :, keys] += tiles[tile, :, :, place]


def _places(call: TileCall) -> Iterator[tuple[int, slice, slice]]:
    """(tile, place among the tile's keys, place among all keys) of each range."""
    for tile, ranges in enumerate(call.ranges):
        at = 0
        for first, end in ranges:
            yield tile, slice(at, at + end - first), slice(first, end)
            at += end - first


def fold_rows(x: Tensor, call: TileCall, heads: int) -> Tensor:
    """[B, Hq, N, D] -> [tiles * B, Hk, group * rows, D]: the query heads of a kv head share its keys as more rows."""
    x = x[:, :, call.first : call.end].unflatten(1, (heads, -1)).unflatten(3, (-1, call.rows))
    return x.permute(3, 0, 1, 2, 4, 5).flatten(0, 1).flatten(2, 3)


def unfold_rows(x: Tensor, call: TileCall, q: Tensor) -> Tensor:
    """[tiles * B, Hk, group * rows, D] -> [B, Hq, tiles * rows, D]."""
    x = x.unflatten(0, (-1, q.shape[0])).unflatten(3, (-1, call.rows))
    return x.permute(1, 2, 3, 0, 4, 5).flatten(3, 4).flatten(1, 2)


def tile_data(q: Tensor, part: Part, call: TileCall, form: Logits) -> TileData:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = (_gather_keys(x, call, dtype) for x in part[:2])
    added = _added_logits(part, call, q, form.q_origin, dtype) if part.bias or any(call.partial) else None
    return TileData(fold_rows(q, call, part.k.shape[1]).to(dtype), k, v, added, form)


def _added_logits(part: Part, call: TileCall, q: Tensor, q_origin: int, dtype: torch.dtype) -> Tensor:
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
