"""The cache of a model layer: the keys and values of every stream, in pages or in one piece per sequence.

Appending reads no length on the host and allocates nothing that a CUDA graph could not replay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spdsl.runtime.cache.append_kernel import Append, NewRows, launch_lengths, launch_rows
from spdsl.runtime.cache.cache_arguments import check_cache, check_page_table, row_index
from spdsl.runtime.entries.close_kernel import Close, Closing, StoredSide
from spdsl.runtime.entries.entries import Cells, entry_count, entry_counts
from spdsl.runtime.launch.launch import uses_kernels
from spdsl.runtime.pools.pool import Pool
from spdsl.runtime.sequences import expect


class StreamShape(NamedTuple):
    heads: int
    qk_dim: int
    v_dim: int  # 0: no values of its own


class CacheStore:
    """`batch` sequences of at most `capacity` tokens.

    Paged (`page` tokens, a power of two >= 16): k[stream] [pages, heads, page, qk], page_table int32
    [batch, pages per sequence] (-1: none). `page=None`: k[stream] [batch, heads, capacity, qk].
    `lengths` and `dropped` (tokens that found no room) are int32 [batch] on the device and updated in place; `lengths`
    is the second column of `spans` [batch, 2] = (0, length), which is what kernels read. Copies (pickle, deepcopy,
    `torch.save`) are caches of their own.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        streams: Mapping[str, StreamShape],
        tokens: Mapping[str, torch.dtype],
        *,
        page: int | None,
        device: torch.device | str,
        dtype: torch.dtype,
        page_table: Tensor | None,
    ) -> None:
        batch, capacity, page = check_cache(batch, capacity, page, page_table, dtype)
        for name, shape in streams.items():
            fits = min(shape.heads, shape.qk_dim) > 0 and shape.v_dim >= 0
            expect(fits, name, "positive heads and dims", tuple(shape))
        self.batch, self.capacity, self.page = batch, capacity, page
        self.at_least = 0  # tokens that every sequence holds for certain, known without asking the device
        self.spans = torch.zeros(batch, 2, dtype=torch.int32, device=device)
        self.dropped = torch.zeros(batch, dtype=torch.int32, device=device)
        self.page_table = self._table(page_table, device)
        # One home more than there are tokens: what finds no room is written there and never read.
        homes = batch if self.page_table is None else self._pages() + 1
        rows = capacity + 1 if page is None else page
        self.k = {name: _storage(homes, s.heads, rows, s.qk_dim, device, dtype) for name, s in streams.items()}
        self.v = {
            name: _storage(homes, s.heads, rows, s.v_dim, device, dtype) for name, s in streams.items() if s.v_dim
        }
        self.tokens = {
            name: torch.zeros(batch, capacity + 1, dtype=kind, device=device) for name, kind in tokens.items()
        }
        self.maps: dict[str, Tensor] = {}  # of drawn choices, made at first use

    @property
    def lengths(self) -> Tensor:
        """A view: what is written there is the length. It is no tensor of its own, or copies would part from it."""
        return self.spans[:, 1]

    @lengths.setter
    def lengths(self, lengths: Tensor) -> None:
        self.spans[:, 1] = lengths

    def _table(self, table: Tensor | None, device: torch.device | str) -> Tensor | None:
        if self.page is None:
            return None
        width = -(-self.capacity // self.page)
        if table is None:
            return torch.arange(self.batch * width, dtype=torch.int32, device=device).view(self.batch, width)
        check_page_table(table, self.batch, width)
        return table.to(device, copy=True).contiguous()

    def _pages(self) -> int:
        table = self.page_table
        assert table is not None
        return max(table.numel(), int(table.max()) + 1 if table.numel() else 0)

    def append(self, k: Mapping[str, Tensor], v: Mapping[str, Tensor], tokens: Mapping[str, Tensor]) -> None:
        """Adds T tokens behind each sequence's own last one: k[stream] [B, heads, T, qk], tokens[name] [B, T].

        Raises ValueError when every sequence is certain to overflow; otherwise tokens without room count as dropped.
        """
        added = next(iter(k.values())).shape[2]
        free = self.capacity - self.at_least
        expect(added <= free, "k", "at most {} more tokens (capacity {})", added, free, self.capacity)
        tokens = {name: x.expand(self.batch, -1) for name, x in tokens.items()}
        append = self._append_by_kernels if uses_kernels(self.lengths) else self._append_by_torch
        append(k, v, tokens, added)
        capturing = self.lengths.is_cuda and torch.cuda.is_current_stream_capturing()
        if not capturing:  # a capture records the step without running it
            self.at_least = min(self.at_least + added, self.capacity)

    def _append_by_kernels(
        self, k: Mapping[str, Tensor], v: Mapping[str, Tensor], tokens: Mapping[str, Tensor], added: int
    ) -> None:
        width = 0 if self.page_table is None else self.page_table.shape[1]
        call, page = Append(self.spans, self.page_table, width, self.capacity, added), self.page or 0
        streams = [
            NewRows(new, self.k[name], v.get(name), self.v[name] if name in v else None) for name, new in k.items()
        ]
        launch_rows(streams, [(new, self.tokens[name]) for name, new in tokens.items()], call, page)
        launch_lengths(self.dropped, call, page)

    def _append_by_torch(
        self, k: Mapping[str, Tensor], v: Mapping[str, Tensor], tokens: Mapping[str, Tensor], added: int
    ) -> None:
        position = self.lengths.long()[:, None] + torch.arange(added, device=self.lengths.device)
        home, slot, room = self._places(position)
        for store, new in [(self.k[name], x) for name, x in k.items()] + [(self.v[name], x) for name, x in v.items()]:
            store[home, :, slot] = new.transpose(1, 2).to(store.dtype)
        for name, values in tokens.items():
            spot = torch.where(room, position, self.capacity)
            self.tokens[name].scatter_(1, spot, values.to(self.tokens[name].dtype))
        kept = room.int().cumprod(1).sum(1, dtype=torch.int32)  # a length never covers a hole
        self.lengths.add_(kept)
        self.dropped += added - kept

    def expect_fits(self, name: str, store: Tensor, new: Tensor) -> None:
        """New keys or values [B, heads, T, dim] against the cache of their stream."""
        heads, dim = store.shape[1], store.shape[3]
        fits = new.shape[0] == self.batch and new.shape[1] == heads and new.shape[3] == dim
        expect(fits, name, "[{}, {}, tokens, {}] like the cache", list(new.shape), self.batch, heads, dim)
        expect(new.dtype == store.dtype, name, f"dtype {store.dtype} like the cache", new.dtype)
        expect(new.device == store.device, name, f"device {store.device} like the cache", new.device)

    def _places(self, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> (home, slot, room) of each position; without room the home or slot that is never read."""
        room = position < self.capacity
        if self.page_table is None or self.page is None:
            sequence = torch.arange(self.batch, device=position.device)[:, None].expand_as(position)
            return sequence, torch.where(room, position, self.capacity), room
        entry = (position // self.page).clamp(max=self.page_table.shape[1] - 1)
        page = self.page_table.long().gather(1, entry)
        room = room & (page >= 0)
        last = next(iter(self.k.values())).shape[0] - 1
        return torch.where(room, page, last), position % self.page, room

    def rows(self, store: Tensor, sequence: int, length: int) -> Tensor:
        """The first rows [1, heads, length, dim] of `k[stream]` or `v[stream]`; of pages a copy."""
        if self.page_table is None or self.page is None:
            return store[sequence : sequence + 1, :, :length]
        pages = self.page_table[sequence, : -(-length // self.page)].long()
        return store[pages].transpose(0, 1).flatten(1, 2)[:, :length].unsqueeze(0)

    def homes(self, sequence: int) -> list[int]:
        """Where tokens of `sequence` lie in `k[stream]`, home after home (host side)."""
        return [sequence] if self.page_table is None else self.page_table[sequence].tolist()

    def reset(self, rows: int | Sequence[int] | Sequence[bool] | Tensor | None = None) -> None:
        """Empties all sequences, or those of `rows`: their numbers (negative ones count from the end), or bool [batch].

        Numbers in a tensor are read on the host; a mask is not.
        """
        chosen = slice(None) if rows is None else row_index(rows, self.batch, self.spans.device)
        self.at_least = 0
        self.lengths[chosen] = 0
        self.dropped[chosen] = 0
        for tokens in self.tokens.values():  # a read past the end of a sequence is 0, not a token of an earlier one
            tokens[chosen] = 0


def _storage(homes: int, heads: int, rows: int, dim: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """[homes, heads, rows, dim], rows a multiple of 16 elements apart: Triton vectorises only over such strides.

    Heads are a multiple of 64 rows apart, or one page: so blocks of keys of all heads are equally far apart.
    """
    room = rows if rows & (rows - 1) == 0 else -(-rows // 64) * 64
    return torch.zeros(homes, heads, room, -(-dim // 16) * 16, device=device, dtype=dtype)[:, :, :rows, :dim]


class EntryShape(NamedTuple):
    """A compressed stream: entries made of cells of another stream, each once its last token is there."""

    heads: int
    qk_dim: int
    v_dim: int  # 0: no values of its own
    cells: Cells


class EntryStore(CacheStore):
    """A cache with compressed streams, too.

    Their entries are never in pages: k[name] [batch, heads, entry_count(capacity) + 1, qk], and v[name] if they have
    values. The last place is for what has no home and is never read. Which entries are there follows from `lengths`.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        streams: Mapping[str, StreamShape],
        tokens: Mapping[str, torch.dtype],
        entries: Mapping[str, EntryShape],
        *,
        page: int | None,
        device: torch.device | str,
        dtype: torch.dtype,
        page_table: Tensor | None,
    ) -> None:
        super().__init__(batch, capacity, streams, tokens, page=page, device=device, dtype=dtype, page_table=page_table)
        self.entries = dict(entries)
        # (0, number of entries) of each sequence, as the kernels of the last close left it.
        self.entry_spans = {name: torch.zeros_like(self.spans) for name in entries}
        for name, shape in entries.items():
            expect(name not in streams, name, "a name that no stream has", name)
            width, stride, before, partial = shape.cells
            expect(min(shape.heads, shape.qk_dim, width, stride) > 0, name, "positive heads, dims and cells", shape)
            expect(0 <= before < width and not partial, name, "cells that close with their last token", shape.cells)
            rows = entry_count(capacity, shape.cells) + 1
            self.k[name] = _storage(batch, shape.heads, rows, shape.qk_dim, device, dtype)
            if shape.v_dim:
                self.v[name] = _storage(batch, shape.heads, rows, shape.v_dim, device, dtype)

    def entry_lengths(self, name: str) -> Tensor:
        """The entries of a compressed stream, int32 [batch]."""
        expect(name in self.entries, "name", "one of {}", name, ", ".join(self.entries))
        return entry_counts(self.lengths, self.entries[name].cells)

    def rows_at(self, store: Tensor, positions: Tensor) -> Tensor:
        """Rows [batch, heads, n, dim] of k[stream] or v[stream] of tokens at positions int64 [batch, n].

        Positions are clamped to the capacity; what stands behind a sequence's length is arbitrary.
        """
        home, slot, _ = self._places(positions.clamp(0, self.capacity - 1))
        return store[home, :, slot].transpose(1, 2)

    def close(
        self,
        name: str,
        source: str,
        added: int,
        pool: Pool,
        weights_k: tuple[Tensor, ...] = (),
        weights_v: tuple[Tensor, ...] | None = None,
        *,
        logits: str | None = None,
    ) -> None:
        """Writes the entries of `name` that closed with the last `added` tokens of stream `source`, once appended.

        With `logits`, a stream on tokens, the pool is called with its cells, too: its keys, and for values its values,
        or its keys where it has none. Then come the weights of keys or values (None: no values are made). How many
        entries are attempted depends on `added` only; one that was there gets the same value.
        """
        found = {} if logits is None else {"k": self.k[logits], "v": self.v.get(logits, self.k[logits])}
        sides = [StoredSide(self.k[source], self.k[name], found.get("k"), weights_k)]
        if weights_v is not None:
            sides.append(StoredSide(self.v[source], self.v[name], found.get("v"), weights_v))
        if uses_kernels(self.lengths):
            pool.close(self._closing(name, added, pool, sides))
        else:
            self._close_by_torch(name, added, pool, sides)

    def _closing(self, name: str, added: int, pool: Pool, sides: Sequence[StoredSide]) -> Closing:
        width = 0 if self.page_table is None else self.page_table.shape[1]
        call = Close(self.spans, self.entry_spans[name], self.page_table, width, self.batch, added)
        cells = self.entries[name].cells
        return Closing(pool, sides, call, -(-added // cells.stride), cells, self.page or 0)

    def _close_by_torch(self, name: str, added: int, pool: Pool, sides: Sequence[StoredSide]) -> None:
        cells = self.entries[name].cells
        number = torch.arange(-(-added // cells.stride), device=self.lengths.device)
        entry = entry_counts(self.lengths - added, cells)[:, None] + number
        first = entry[:, :, None] * cells.stride - cells.before
        positions = first + torch.arange(cells.width, device=entry.device)
        there = positions >= 0 if cells.before else None
        spare = self.k[name].shape[2] - 1
        slot = torch.where(entry < self.entry_lengths(name)[:, None], entry, spare)
        sequence = torch.arange(self.batch, device=entry.device)[:, None]

        def taken(store: Tensor) -> Tensor:
            rows = self.rows_at(store, positions.flatten(1))
            rows = rows.reshape(*rows.shape[:2], *positions.shape[1:], rows.shape[3])
            return rows if there is None else rows.masked_fill(~there[:, None, :, :, None], 0)

        for side in sides:
            others = () if side.logits is None else (taken(side.logits),)
            entries = pool.entries(taken(side.tokens), there, *others, *side.weights)
            side.entries[sequence, :, slot] = entries.transpose(1, 2).to(side.entries.dtype)
