"""The cache of a model layer: the states of every stream, in pages or in one piece per sequence.

A step reads no length on the host and allocates nothing that a CUDA graph could not replay; nor does any other change
of what the cache holds, unless its arguments are numbers in a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spdsl.runtime.cache.cache_arguments import (
    check_cache,
    check_exported,
    check_page_table,
    checked_ring,
    expect_rows,
    held_by_ring,
    length_argument,
    row_index,
)
from spdsl.runtime.cache.ring import Ring, put_slots, row_pages, slots_of
from spdsl.runtime.cache.sharing import references, with_own_pages
from spdsl.runtime.cache.states import Kept, State, kept_of, stream_states
from spdsl.runtime.cache.storage import EntryShape, NewTokens, Storage
from spdsl.runtime.call.arguments import TRANSPOSED
from spdsl.runtime.entries.entries import entry_count, entry_counts
from spdsl.runtime.launch.eager import eager
from spdsl.runtime.sequences import expect


class StreamShape(NamedTuple):
    heads: int
    qk_dim: int
    v_dim: int  # 0: no values of its own


class CacheStore(Storage):
    """`batch` sequences of at most `capacity` tokens.

    Paged (`page` tokens, a power of two >= 16): k[stream] [pages + 1, heads, page, qk], page_table int32
    [batch, pages per sequence] (-1: none). `page=None`: k[stream] [batch, heads, capacity + 1, qk]. tokens[name]
    [batch, ..], capacity + 1 in place of its tokens, is never in pages.
    `lengths` and `dropped` (tokens that found no room) are int32 [batch] on the device and updated in place; `lengths`
    is the second column of `spans` [batch, 2] = (0, length), which is what kernels read. Copies (pickle, deepcopy,
    `torch.save`) are caches of their own. `states` is the table of all buffers.

    Entries of compressed streams are never in pages: k[name] [batch, heads, entry_count(capacity) + 1, qk], and v[name]
    if they have values. The last place is for what has no home and is never read. Which entries are there follows from
    `lengths`.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        streams: Mapping[str, StreamShape],
        tokens: Sequence[State] = (),
        entries: Mapping[str, EntryShape] | None = None,
        *,
        page: int | None,
        device: torch.device | str,
        dtype: torch.dtype,
        page_table: Tensor | None,
        keep: tuple[int, int, int] | None = None,
    ) -> None:
        batch, capacity, page = check_cache(batch, capacity, page, page_table, dtype)
        self.ring = None if keep is None else checked_ring(*keep, page, page_table)
        self.entries = dict(entries or {})
        _check_shapes(streams, self.entries)
        self.batch, self.capacity, self.page = batch, capacity, page
        # Tokens that every sequence holds for certain, and may hold, known without asking the device.
        self.at_least, self.at_most = 0, 0
        self.watched = True  # whether anything is known at all
        self.grown = False  # whether it was a compiled step that changed the lengths
        with torch.inference_mode(False):  # a tensor that counts its changes
            self.spans = torch.zeros(batch, 2, dtype=torch.int32, device=device)
        self._changes = self.spans._version
        self.dropped = torch.zeros(batch, dtype=torch.int32, device=device)
        # Of a ring: how long each sequence has been, up to the last time that something was taken back.
        self.reached = None if self.ring is None else torch.zeros_like(self.dropped)
        # (0, number of entries) of each sequence, as the kernels of the last close left it.
        self.entry_spans = {name: torch.zeros_like(self.spans) for name in self.entries}
        self.row_of = None
        self.has_holes, self.shares = page_table is not None, False
        self.page_table = self._table(page_table, device)
        self.owned = self._owned_pages(page_table)
        self.dtype = dtype
        self.states = _states(streams, tokens, self.entries, dtype)
        self.token_axes = {state.of[1]: 1 + state.before for state in tokens}
        self.k, self.v, self.tokens = {}, {}, {}
        for state in self.allocated:
            self._put(state, self._allocated(state))

    @property
    def lengths(self) -> Tensor:
        """A view: what is written there is the length. It is no tensor of its own, or copies would part from it."""
        return self.spans[:, 1]

    @lengths.setter
    def lengths(self, lengths: Tensor) -> None:
        self.spans[:, 1] = lengths

    def _known(self) -> tuple[int, int]:
        """Least and most tokens of any sequence as far as the host knows: nothing, if others wrote to `lengths`."""
        if self.watched and not torch.compiler.is_compiling() and self.spans._version != self._changes:
            self.at_least, self.at_most, self._changes = 0, self.capacity, self.spans._version
            if not self.grown:
                self._reached_anything()
            self.grown = False
        return self.at_least, self.at_most

    def __getstate__(self) -> dict[str, object]:
        self._known()
        return self.__dict__

    def __setstate__(self, state: dict[str, object]) -> None:
        """A copy knows as much: its lengths are those of the original, but count changes anew."""
        self.__dict__.update(state)
        with torch.inference_mode(False):  # a tensor that counts its changes
            self.spans = self.spans.clone() if self.spans.is_inference() else self.spans
        self._changes = self.spans._version

    def _knows(self, at_least: int, at_most: int) -> None:
        if not self.watched:
            return
        self.at_least, self.at_most = min(at_least, self.capacity), min(at_most, self.capacity)
        if not torch.compiler.is_compiling():
            self._changes = self.spans._version

    def with_buffers(
        self, found: Mapping[str, Tensor], table: Tensor | None, page: int | None, capacity: int, spare: int
    ) -> CacheStore:
        """Itself as a cache of other buffers, by the names of their states, of which the host knows nothing.

        spare: of a ring, 0: there is none.
        """
        self.batch, self.capacity, self.page, self.page_table = len(found["spans"]), capacity, page, table
        self.spans, self.dropped = found["spans"], found["dropped"]
        self.ring = Ring(0, 0, spare) if spare else None
        self.watched, self.at_least, self.at_most = False, 0, capacity
        self.states = tuple(state.sized(found[state.name], anew=True) for state in self.states)
        self.k, self.v, self.tokens = {}, {}, {}
        for state in self.states:
            self._put(state, found[state.name])
        self.entry_spans = {name: found[name] for name in self.entry_spans}
        return self

    def _table(self, table: Tensor | None, device: torch.device | str) -> Tensor | None:
        if self.page is None:
            return None
        width = -(-self.capacity // self.page)
        if self.ring is not None:
            return self.ring.table(self.batch, width, device)
        if table is None:
            return torch.arange(self.batch * width, dtype=torch.int32, device=device).view(self.batch, width)
        check_page_table(table, self.batch, width, self.spans.is_meta)
        return table.to(device, copy=True).contiguous()

    def _owned_pages(self, given: Tensor | None) -> Tensor | None:
        """bool [pages]: those that the table named at first, and storage was made for."""
        table = self.page_table
        if table is None:
            return None
        if given is None:
            pages = table.numel() if self.ring is None else self.batch * self.ring.pages
            return torch.ones(pages, dtype=torch.bool, device=table.device)
        named = 0 if given.is_meta or not given.numel() else int(given.max()) + 1
        return references(table, max(table.numel(), named)) > 0

    def _allocated(self, state: State) -> Tensor:
        # One home more than there are tokens: what finds no room is written there and never read.
        homes, places = self.batch, self.capacity + 1
        if state.grid in self.entries:
            places = entry_count(self.capacity, self.entries[state.grid].cells) + 1
        elif state.grid == "token" and self.owned is not None and self.page is not None:
            homes, places = len(self.owned) + 1, self.page
        shape, device = state.shape(homes, places), self.spans.device
        if state.grid == "row":
            return torch.zeros(shape, dtype=state.dtype, device=device)
        homes, heads, places, dim = shape
        return storage_of(homes, heads, places, dim, device, state.dtype)

    @property
    def allocated(self) -> list[State]:
        """The states that have a buffer: all whose sizes are known."""
        return [state for state in self.states if state.sizes is not None]

    def buffer(self, state: State) -> Tensor:
        side, name = state.of
        found: Tensor = getattr(self, side)[name]
        return found

    def _put(self, state: State, x: Tensor) -> None:
        side, name = state.of
        getattr(self, side)[name] = x

    def size_tokens(self, tokens: Mapping[str, Tensor]) -> None:
        """Buffers for tensors over tokens of which the first call says the sizes."""
        found = []
        for state in self.states:
            side, name = state.of
            if side == "tokens" and name not in self.tokens and name in tokens:
                state = state.sized(tokens[name])
                self._put(state, self._allocated(state))
            found.append(state)
        self.states = tuple(found)

    def kept(self) -> dict[str, Kept]:
        """The shape and the bytes of every state, by name, and those of the tables beside them."""
        tables = {"lengths": self.spans, "dropped": self.dropped, "page_table": self.page_table, "owned": self.owned}
        tables |= {"reached": self.reached}
        tables |= {f"entry_lengths.{name}": spans for name, spans in self.entry_spans.items()}
        buffers = {state.name: self.buffer(state) for state in self.allocated}
        return {name: kept_of(x) for name, x in {**buffers, **tables}.items() if x is not None}

    # Appending -----------------------------------------------------------------------------------------------------

    def append_tokens(
        self,
        k: Mapping[str, Tensor],
        v: Mapping[str, Tensor],
        tokens: Mapping[str, Tensor],
        new: NewTokens | None = None,
        rows: Tensor | None = None,
    ) -> Storage:
        """Adds new tokens behind each sequence's own last one: k[stream] [B, heads, T, qk], tokens [B, .., T, ..].

        -> what the call reads then: the cache, or those of its `rows`.
        Raises ValueError when every sequence is certain to overflow; otherwise tokens without room count as dropped.
        """
        new = new or NewTokens(next(iter(k.values())).shape[2])
        at_least, at_most = self._known()
        free = self.capacity - at_least
        if self.ring is not None:
            expect(
                new.longest <= self.ring.spare, "k", "at most {} tokens at once (ring)", new.longest, self.ring.spare
            )
        certain = new.spans is None
        fits = not certain or new.longest <= free
        expect(fits, "k", "at most {} more tokens (capacity {})", new.longest, free, self.capacity)
        self.size_tokens(tokens)
        own = self if rows is None else self.part(rows)
        own.add(k, v, tokens, new)
        if rows is not None:
            self.spans.index_copy_(0, rows, own.spans)
            self.dropped.index_copy_(0, rows, own.dropped)
        capturing = self.spans.is_cuda and torch.cuda.is_current_stream_capturing()
        if not capturing:  # a capture records the step without running it
            self._knows(at_least + new.longest * (certain and rows is None), at_most + new.longest)
        return own

    def may_overflow(self, added: int) -> bool:
        """Whether one of `added` more tokens might find no room, as far as is known without asking the device."""
        capturing = self.spans.is_cuda and torch.cuda.is_current_stream_capturing()
        return self.has_holes or capturing or self._known()[1] + added > self.capacity

    def closed(self, own: Storage, rows: Tensor | None) -> None:
        """After the entries of all streams are closed in `own`."""
        if rows is not None:
            for name, spans in self.entry_spans.items():
                spans.index_copy_(0, rows, own.entry_spans[name])

    def expect_fits(self, name: str, store: Tensor, new: Tensor) -> None:
        """New keys or values [B, heads, T, dim] against the cache of their stream."""
        heads, dim = store.shape[1], store.shape[3]
        fits = new.shape[1] == heads and new.shape[3] == dim
        if not fits:
            hint = TRANSPOSED if new.shape[2] == heads and new.shape[3] == dim else ""
            wrong = f"[{new.shape[0]}, {heads}, tokens, {dim}] like the cache"
            expect(False, name, wrong, f"{list(new.shape)}{hint}")
        expect(new.dtype == store.dtype, name, f"dtype {store.dtype} like the cache", new.dtype)
        expect(new.device == store.device, name, f"device {store.device} like the cache", new.device)

    def expect_sizes_of(self, name: str, new: Tensor) -> None:
        """A new tensor over tokens, checked by itself, against those before it."""
        state = next(state for state in self.states if state.name == f"tokens.{name}")
        if state.sizes is not None:
            expect(
                state.sizes_of(new) == state.sizes,
                name,
                "{} beside tokens, like the cache",
                state.sizes_of(new),
                state.sizes,
            )

    def part(self, rows: Tensor) -> Storage:
        """Some of the rows, int64 [n], each once: buffers are the same, lengths are copies."""
        own = Storage()
        own.k, own.v, own.entries = self.k, self.v, self.entries
        own.tokens, own.token_axes = self.tokens, self.token_axes
        own.page, own.capacity, own.row_of = self.page, self.capacity, rows.int()
        own.spans, own.dropped = self.spans.index_select(0, rows), self.dropped.index_select(0, rows)
        own.page_table = None if self.page_table is None else self.page_table.index_select(0, rows)
        own.entry_spans = {name: x.index_select(0, rows) for name, x in self.entry_spans.items()}
        return own

    # What is kept of it ----------------------------------------------------------------------------------------------

    @eager
    def reset(self, rows: int | Sequence[int] | Sequence[bool] | Tensor | None = None) -> None:
        """Empties all sequences, or those of `rows`: their numbers (negative ones count from the end), or bool [batch].

        Numbers in a tensor are read on the host; a mask is not.
        """
        device = self.spans.device
        chosen = None if rows is None else row_index(rows, self.batch, device)
        if chosen is None:
            emptied = torch.ones(self.batch, dtype=torch.bool, device=device)
        elif chosen.dtype == torch.bool:
            emptied = chosen
        else:
            emptied = torch.zeros(self.batch, dtype=torch.bool, device=device).index_fill_(0, chosen, True)
        most = 0 if rows is None else self._known()[1]
        self.dropped.masked_fill_(emptied, 0)
        if self.reached is not None:
            self.reached.copy_(self.reached.maximum(self.lengths).masked_fill(emptied, 0))
        self._set_lengths(self.lengths.masked_fill(emptied, 0))
        self.shares = self.shares and rows is not None
        self._knows(0, most)

    @eager
    def truncate(self, lengths: int | Sequence[int] | Tensor) -> None:
        """Takes tokens back: each sequence keeps its first ones, as many as said, or all where it has no more.

        lengths: one number for all, or int [batch]; a tensor is not read on the host, and counts as 0 below 0. Of a
        ring, the last `spare` tokens can be taken back: less is refused where the host knows it, and counts as that.
        """
        kept, least, most = length_argument(lengths, self.batch, self.capacity, self.spans.device)
        at_least, at_most = self._known()
        if self.reached is not None and self.ring is not None:
            certain = least if not isinstance(lengths, Tensor) else self.capacity
            expect(
                certain >= at_least - self.ring.spare,
                "lengths",
                "numbers from {} on (ring)",
                lengths,
                at_least - self.ring.spare,
            )
            self.reached.copy_(self.reached.maximum(self.lengths))
            kept = held_by_ring(kept, self.reached - self.ring.spare)
        self._set_lengths(self.lengths.minimum(kept))
        self._knows(min(at_least, least), min(at_most, most))

    @eager
    def select(self, rows: Sequence[int] | Tensor) -> None:
        """Row i goes on with what row rows[i] holds; rows may repeat, and be left out; `batch` is then their number.

        rows: numbers from 0, a list or a tensor int [n], which is not read on the host. Pages are shared until one of
        the sequences writes to them; what is in no page is copied.
        """
        chosen, known = expect_rows(rows, self.batch, self.spans.device), self._known()
        if len(chosen) > self.batch and self.owned is not None:
            self._grow(len(chosen))
        if self.ring is not None:
            self._turn(chosen, self.ring)
        for state in self.allocated:
            if state.grid != "token" or self.page_table is None:
                self._put(state, _selected(self.buffer(state), chosen, aligned=state.grid != "row"))
        if self.reached is not None:
            self.reached = _selected(self.reached.maximum(self.lengths), chosen)
        self.spans, self.dropped = _selected(self.spans, chosen), _selected(self.dropped, chosen)
        self.entry_spans = {name: _selected(spans, chosen) for name, spans in self.entry_spans.items()}
        if self.page_table is not None and self.ring is None:
            self.page_table = _selected(self.page_table, chosen)
        self.batch, self.shares = len(chosen), self.ring is None
        self._part_pages()
        self._knows(0 if self.has_holes else known[0], known[1])

    def _reached_anything(self) -> None:
        """Of a ring, when others say the lengths: no more than `spare` tokens were taken back."""
        if self.reached is not None and self.ring is not None:
            self.reached.copy_(self.lengths + self.ring.spare)

    def _set_lengths(self, lengths: Tensor) -> None:
        """No more than before; all states follow."""
        self.lengths.copy_(lengths)
        self._part_pages()
        for state in self.allocated:
            if state.grid == "row":  # a read past the end of a sequence is 0, not a token of an earlier one
                past = torch.arange(self.capacity + 1, device=lengths.device) >= self.lengths[:, None]
                self.buffer(state).masked_fill_(state.of_places(past), 0)
        for name, spans in self.entry_spans.items():
            spans[:, 1] = entry_counts(self.lengths, self.entries[name].whole)

    def _part_pages(self) -> None:
        """Pages that will be written belong to one sequence each; what is in them goes along."""
        if self.page_table is None or self.page is None or self.owned is None or not self.shares:
            return
        moved = with_own_pages(self.page_table, self.lengths, self.page, self.owned)
        for state in self.states:
            if state.grid == "token":
                store = self.buffer(state)
                store[moved.target] = store[moved.source]
        self.page_table.copy_(moved.table)
        self.dropped += self.lengths - moved.lengths
        self.lengths.copy_(moved.lengths)

    def _grow(self, batch: int) -> None:
        """Storage for the pages of more sequences."""
        table, owned = self.page_table, self.owned
        assert table is not None
        assert owned is not None
        width = table.shape[1] if self.ring is None else self.ring.pages
        room = self.batch * width if self.has_holes else len(owned)
        more = max(0, batch * width - room)
        self.owned = torch.cat([owned, owned.new_ones(more)])
        for state in self.states:
            if state.grid == "token":
                old, new = self.buffer(state), self._allocated(state)
                new[: len(owned)].copy_(old[:-1])
                self._put(state, new)

    def _turn(self, rows: Tensor, ring: Ring) -> None:
        """Rows of a ring have pages of their own, in which all may change: they are copied."""
        assert self.page_table is not None
        for state in self.states:
            if state.grid == "token":
                store = self.buffer(state)
                store[: len(rows) * ring.pages] = store.index_select(0, row_pages(rows, ring))
        table = ring.table(len(rows), self.page_table.shape[1], rows.device)
        self.page_table = self.page_table.copy_(table) if len(rows) == self.batch else table

    # All of it -------------------------------------------------------------------------------------------------------

    @eager
    def export_states(self) -> dict[str, Tensor]:
        """Copies of all states by name, whatever pages they lie in, 0 behind what a sequence has.

        `lengths` and `dropped` int32 [batch]; `k.<stream>`, `v.<stream>` [batch, heads, capacity or entries, dim], of a
        ring [batch, heads, slots, dim] as it is; `tokens.<tensor>` [batch, ..], `capacity` in place of its tokens; not
        before the first call where only that says how many heads it has.
        """
        found = {"lengths": self.lengths.clone(), "dropped": self.dropped.clone()}
        for state, count, places in self._grids():
            inside = places < count[:, None]
            if state.grid == "row":
                found[state.name] = self._of_rows(state).clone()
                continue
            if state.grid == "token" and self.ring is not None:
                found[state.name] = slots_of(self.buffer(state), self.batch, self.ring)
                continue
            if state.grid == "token":
                x = self.rows_at(self.buffer(state), places.expand(self.batch, -1))
            else:
                x = self.buffer(state)[:, :, : len(places)]
            found[state.name] = x.masked_fill(~state.of_places(inside), 0)
        return found

    def _of_rows(self, state: State) -> Tensor:
        """A buffer that is in no page, without the place that is never read."""
        return self.buffer(state).narrow(1 + state.before, 0, self.capacity)

    @eager
    def import_states(self, states: Mapping[str, Tensor]) -> None:
        """Takes over what `export_states` of a cache with the same streams, batch and capacity gave.

        Raises ValueError for a state that is missing, unknown, or of another shape or dtype; nothing is changed then.
        """
        check_exported(states, self)
        self.size_tokens({name[7:]: x for name, x in states.items() if name.startswith("tokens.")})
        self.reset()
        self.lengths.copy_(states["lengths"])
        self.dropped.copy_(states["dropped"])
        for state, count, places in self._grids():
            x = states[state.name].to(self.spans.device)
            if state.grid == "row":
                self._of_rows(state).copy_(x)
            elif state.grid == "token" and self.ring is not None:
                put_slots(self.buffer(state), x, self.ring)
            elif state.grid == "token":
                home, slot, _ = self.places(places.expand(self.batch, -1), places < count[:, None])
                self.buffer(state)[home, :, slot] = x.transpose(1, 2)
            else:
                self.buffer(state)[:, :, : len(places)].copy_(x)
        for name, spans in self.entry_spans.items():
            spans[:, 1] = self.entry_lengths(name)
        self._reached_anything()
        self._knows(0, self.capacity)

    def _grids(self) -> Iterator[tuple[State, Tensor, Tensor]]:
        """Each state, how many places of its grid each sequence has, and all that it may have."""
        for state in self.allocated:
            counts, most = self.lengths, self.capacity
            if state.grid in self.entries:
                counts, most = self.entry_lengths(state.grid), entry_count(most, self.entries[state.grid].whole)
            yield state, counts, torch.arange(most, device=counts.device)


def _states(
    streams: Mapping[str, StreamShape],
    tokens: Sequence[State],
    entries: Mapping[str, EntryShape],
    dtype: torch.dtype,
) -> tuple[State, ...]:
    """The table of all buffers."""
    found = [x for name, shape in streams.items() for x in stream_states(name, *shape, "token", "append", dtype)]
    found += tokens
    for name, shape in entries.items():
        found += stream_states(name, *shape[:3], name, "close", dtype)
    return tuple(found)


def _check_shapes(streams: Mapping[str, StreamShape], entries: Mapping[str, EntryShape]) -> None:
    for name, shape in streams.items():
        expect(min(shape.heads, shape.qk_dim) > 0 and shape.v_dim >= 0, name, "positive heads and dims", tuple(shape))
    for name, made in entries.items():
        expect(name not in streams, name, "a name that no stream has", name)
        width, stride, before, _ = made.cells
        expect(min(made.heads, made.qk_dim, width, stride) > 0, name, "positive heads, dims and cells", made)
        expect(0 <= before < width, name, "cells that reach their place", made.cells)


def _selected(x: Tensor, rows: Tensor, aligned: bool = False) -> Tensor:
    """x at `rows`, in the memory of x if there are as many; `aligned`: else as `storage_of` lays it out."""
    found = x.index_select(0, rows)
    if len(rows) == len(x):
        return x.copy_(found)
    if not aligned:
        return found
    _, heads, places, dim = x.shape
    return storage_of(len(rows), heads, places, dim, x.device, x.dtype).copy_(found)


def storage_of(homes: int, heads: int, rows: int, dim: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """[homes, heads, rows, dim], rows a multiple of 16 elements apart: Triton vectorises only over such strides.

    Heads are a multiple of 64 rows apart, or one page: so blocks of keys of all heads are equally far apart.
    """
    room = rows if rows & (rows - 1) == 0 else -(-rows // 64) * 64
    return torch.zeros(homes, heads, room, -(-dim // 16) * 16, device=device, dtype=dtype)[:, :, :rows, :dim]
