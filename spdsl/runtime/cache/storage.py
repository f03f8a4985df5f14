"""Where the tokens and entries of sequences lie: in a cache, in some of its rows, or in pages of somebody else.

Position and slot are two things: the table of a sequence says in which home each of its tokens lies. Nothing here reads
the device on the host, but for `rows`, `homes` and `entry_rows`, which the CPU path asks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spdsl.runtime.cache.append_kernel import Append, NewRows, launch_lengths, launch_rows
from spdsl.runtime.entries.close_kernel import Close, Closing, StoredSide
from spdsl.runtime.entries.entries import Cells, entry_count, entry_counts, entry_spans
from spdsl.runtime.launch.launch import Paged, uses_kernels
from spdsl.runtime.pools.pool import Pool
from spdsl.runtime.sequences import expect

# Tokens of the one page that stands for the row of a cache without pages, where a call has some of the rows.
WHOLE = 1 << 30


class EntryShape(NamedTuple):
    """A compressed stream: entries made of cells of another stream, each once its last token is there.

    `partial` cells: behind these lies the entry of the cell that has not closed yet, as the last call left it.
    """

    heads: int
    qk_dim: int
    v_dim: int  # 0: no values of its own
    cells: Cells

    @property
    def whole(self) -> Cells:
        """Those that close for good."""
        return self.cells._replace(partial=False)


class NewTokens(NamedTuple):
    """The tokens that a call brings: at most `longest` of each sequence.

    spans: int32 [S, 2] = (start, count) of each sequence's own in the tensors of the call, in a batch row of its own
    or in the one row that all share. None: `longest` of each.
    """

    longest: int
    spans: Tensor | None = None


class Storage:
    """What kernels and the CPU path read of S sequences.

    k[stream], v[stream] [homes, heads, slots, dim]: position p of sequence s lies in home page_table[s, p // page],
    slot p % page, without pages in home s, slot p. Where `row_of` int32 [S] is given, sequence s is row row_of[s] of
    everything that is not in pages. Entries of compressed streams are never in pages, nor are tensors over tokens:
    tokens[name] [rows, ..], with positions along axis token_axes[name].
    spans int32 [S, 2] = (0, length). dropped int32 [S]: tokens that found no room.
    """

    k: dict[str, Tensor]
    v: dict[str, Tensor]
    tokens: dict[str, Tensor]
    token_axes: dict[str, int]
    spans: Tensor
    dropped: Tensor
    page_table: Tensor | None
    page: int | None
    capacity: int
    row_of: Tensor | None
    entries: dict[str, EntryShape]
    entry_spans: dict[str, Tensor]

    @property
    def lengths(self) -> Tensor:
        """A view: what is written there is the length. It is no tensor of its own, or copies would part from it."""
        return self.spans[:, 1]

    def add(
        self, k: Mapping[str, Tensor], v: Mapping[str, Tensor], tokens: Mapping[str, Tensor], new: NewTokens
    ) -> None:
        """Adds new tokens behind each sequence's own last one: k[stream] [B, heads, T, qk], tokens [B, .., T, ..]."""
        add = self._add_by_kernels if uses_kernels(self.spans) else self._add_by_torch
        add(k, v, tokens, new)

    def _add_by_kernels(
        self, k: Mapping[str, Tensor], v: Mapping[str, Tensor], tokens: Mapping[str, Tensor], new: NewTokens
    ) -> None:
        table, page, _, _ = paged_of(self)
        width = 0 if table is None else table.shape[1]
        call = Append(self.spans, table, width, self.capacity, new.longest, new.spans, self.row_of)
        streams = [NewRows(x, self.k[name], v.get(name), self.v[name] if name in v else None) for name, x in k.items()]
        launch_rows(streams, self._token_rows(tokens), call, page)
        launch_lengths(self.dropped, call, page)

    def _add_by_torch(
        self, k: Mapping[str, Tensor], v: Mapping[str, Tensor], tokens: Mapping[str, Tensor], new: NewTokens
    ) -> None:
        number = torch.arange(new.longest, device=self.spans.device)
        position = self.lengths.long()[:, None] + number
        brought = None if new.spans is None else number < new.spans[:, 1:]
        home, slot, room = self.places(position, brought)
        for store, x in [(self.k[name], x) for name, x in k.items()] + [(self.v[name], x) for name, x in v.items()]:
            store[home, :, slot] = _brought(x, new).transpose(1, 2).to(store.dtype)
        row, spot = self._rows(position), torch.where(room, position, self.capacity)
        for x, store in self._token_rows(tokens):
            store[row, :, spot] = _brought(x, new).transpose(1, 2).to(store.dtype)
        kept = room.int().cumprod(1).sum(1, dtype=torch.int32)  # a length never covers a hole
        self.lengths.add_(kept)
        self.dropped += (new.longest if new.spans is None else new.spans[:, 1]) - kept

    def _token_rows(self, tokens: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """New tensors over tokens and their stores, both as rows [B, .., tokens, ..] of vectors: four axes."""
        axes = self.token_axes
        return [(_as_rows(x, axes[name]), _as_rows(self.tokens[name], axes[name])) for name, x in tokens.items()]

    def places(self, position: Tensor, asked: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """-> (home, slot, room) of each position [S, n]; without room the home or slot that is never read."""
        room = position < self.capacity
        room = room if asked is None else room & asked
        if self.page_table is None or self.page is None:
            return self._rows(position), torch.where(room, position, self.capacity), room
        entry = (position // self.page).clamp(max=self.page_table.shape[1] - 1)
        page = self.page_table.long().gather(1, entry)
        last = next(iter(self.k.values())).shape[0] - 1
        room = room & (page >= 0) & (page <= last)  # tables of others hold anything behind a length
        return torch.where(room, page, last), position % self.page, room

    def _rows(self, like: Tensor) -> Tensor:
        """The row of each sequence where it is in no page, in the shape of `like` [S, n]."""
        own = torch.arange(len(like), device=like.device) if self.row_of is None else self.row_of.long()
        return own[:, None].expand_as(like)

    def rows(self, store: Tensor, sequence: int, length: int) -> Tensor:
        """The first rows [1, heads, length, dim] of `k[stream]` or `v[stream]`; of pages a copy."""
        if self.page_table is None or self.page is None:
            return self.entry_rows(store, sequence, slice(0, length))
        pages = self.page_table[sequence, : -(-length // self.page)].long()
        return store[pages].transpose(0, 1).flatten(1, 2)[:, :length].unsqueeze(0)

    def entry_rows(self, store: Tensor, sequence: int, part: slice) -> Tensor:
        """A part of what lies in no page, [1, heads, n, dim]."""
        row = sequence if self.row_of is None else int(self.row_of[sequence])
        return store[row : row + 1, :, part]

    def homes(self, sequence: int) -> list[int]:
        """Where tokens of `sequence` lie in `k[stream]`, home after home (host side)."""
        if self.page_table is not None:
            return self.page_table[sequence].tolist()
        return [sequence if self.row_of is None else int(self.row_of[sequence])]

    def token_values(self, name: str) -> Tensor:
        """tokens[name] of each sequence, [S, .., capacity, ..]; of some of the rows a copy."""
        own = self.tokens[name] if self.row_of is None else self.tokens[name].index_select(0, self.row_of)
        return own.narrow(self.token_axes[name], 0, self.capacity)

    def entry_lengths(self, name: str) -> Tensor:
        """The entries of a compressed stream that have closed, int32 [S]."""
        expect(name in self.entries, "name", "one of {}", name, ", ".join(self.entries))
        return entry_counts(self.lengths, self.entries[name].whole)

    def rows_at(self, store: Tensor, positions: Tensor) -> Tensor:
        """Rows [S, heads, n, dim] of k[stream] or v[stream] of tokens at positions int64 [S, n].

        Positions are clamped to the capacity; what stands behind a sequence's length is arbitrary.
        """
        home, slot, _ = self.places(positions.clamp(0, self.capacity - 1))
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
        entries are attempted depends on `added` only, which may be more than a sequence got; one that was there gets
        the same value.
        """
        sides = self._sides(name, source, weights_k, weights_v, logits)
        if uses_kernels(self.spans):
            pool.close(self._closing(name, added, pool, sides))
        else:
            self._close_by_torch(name, added, pool, sides)

    def close_short(
        self, name: str, source: str, pool: Pool, weights_v: tuple[Tensor, ...] | None = None
    ) -> None:  # fmt: skip
        """Writes the entry of the tokens that no whole cell of `name` has, behind those that closed: by torch."""
        cells, length = self.entries[name].cells, self.lengths[:, None]
        entry = self.entry_lengths(name)[:, None]
        positions = entry[:, :, None] * cells.stride - cells.before + torch.arange(cells.width, device=length.device)
        there = (positions >= 0) & (positions < length[:, :, None])
        spare = self.k[name].shape[2] - 1
        slot = torch.where(entry < entry_counts(length, cells), entry, spare)
        self._put_entries(pool, self._sides(name, source, (), weights_v), positions, there, slot)

    def _sides(
        self, name: str, source: str, weights_k: tuple[Tensor, ...], weights_v: tuple[Tensor, ...] | None,
        logits: str | None = None,
    ) -> list[StoredSide]:  # fmt: skip
        """The keys, and the values if any are made, of a compressed stream."""
        found = {} if logits is None else {"k": self.k[logits], "v": self.v.get(logits, self.k[logits])}
        sides = [StoredSide(self.k[source], self.k[name], found.get("k"), weights_k)]
        if weights_v is not None:
            sides.append(StoredSide(self.v[source], self.v[name], found.get("v"), weights_v))
        return sides

    def _closing(self, name: str, added: int, pool: Pool, sides: Sequence[StoredSide]) -> Closing:
        table, page, _, _ = paged_of(self)
        width = 0 if table is None else table.shape[1]
        call = Close(self.spans, self.entry_spans[name], table, width, len(self.spans), added, self.row_of)
        cells = self.entries[name].whole
        return Closing(pool, sides, call, -(-added // cells.stride), cells, page)

    def _close_by_torch(self, name: str, added: int, pool: Pool, sides: Sequence[StoredSide]) -> None:
        cells = self.entries[name].whole
        number = torch.arange(-(-added // cells.stride), device=self.spans.device)
        entry = entry_counts(self.lengths - added, cells)[:, None] + number
        first = entry[:, :, None] * cells.stride - cells.before
        positions = first + torch.arange(cells.width, device=entry.device)
        there = positions >= 0 if cells.before else None
        spare = self.k[name].shape[2] - 1
        slot = torch.where(entry < self.entry_lengths(name)[:, None], entry, spare)
        self._put_entries(pool, sides, positions, there, slot)

    def _put_entries(
        self, pool: Pool, sides: Sequence[StoredSide], positions: Tensor, there: Tensor | None, slot: Tensor
    ) -> None:
        """Entries of the tokens at positions [S, n, width], of which some are `there`, at slots [S, n]."""

        def taken(store: Tensor) -> Tensor:
            rows = self.rows_at(store, positions.flatten(1))
            rows = rows.reshape(*rows.shape[:2], *positions.shape[1:], rows.shape[3])
            return rows if there is None else rows.masked_fill(~there[:, None, :, :, None], 0)

        for side in sides:
            others = () if side.logits is None else (taken(side.logits),)
            entries = pool.entries(taken(side.tokens), there, *others, *side.weights)
            side.entries[self._rows(slot), :, slot] = entries.transpose(1, 2).to(side.entries.dtype)


def _as_rows(x: Tensor, axis: int) -> Tensor:
    """x [B, .., tokens, ..] as [B, before, tokens, after], a view of what is contiguous; `axis`: that of tokens."""
    x = x.unsqueeze(1) if axis == 1 else x.flatten(1, axis - 1)
    return x.unsqueeze(3) if x.dim() == 3 else x.flatten(3)


def _brought(x: Tensor, new: NewTokens) -> Tensor:
    """The new tokens of each sequence, [S, heads, longest, dim], of x [B, heads, T, dim]; past its own any others."""
    if new.spans is None:
        return x
    token = new.spans[:, :1].long() + torch.arange(new.longest, device=x.device)
    token = token.clamp(0, max(0, x.shape[2] - 1))
    sequence = torch.arange(len(token), device=x.device)[:, None].clamp(max=x.shape[0] - 1)
    return x.transpose(1, 2)[sequence, token].transpose(1, 2)


def paged_of(own: Storage) -> Paged:
    """Where kernels find tokens. A row of its own is one page."""
    if own.page_table is not None:
        return Paged(own.page_table, own.page or 0, own.capacity)
    if own.row_of is not None:
        return Paged(own.row_of[:, None], WHOLE, own.capacity)
    return Paged(None, 0, own.capacity)


def paged_entries(own: Storage, name: str) -> Paged:
    """Where kernels find the entries of a compressed stream, and how many each sequence has."""
    cells, spans = own.entries[name].cells, own.entry_spans[name]
    if cells.partial:  # with the cell that has not closed
        spans = entry_spans(own.spans, cells, packed=False)
    count = entry_count(own.capacity, cells)
    if own.row_of is not None:
        return Paged(own.row_of[:, None], WHOLE, count, spans)
    return Paged(None, 0, count, spans)
