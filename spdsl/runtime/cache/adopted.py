"""Pages that somebody else owns and fills: attention of packed queries over them.

The calls read no length, table or page on the host, and store nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spdsl.runtime.cache.cache import storage_of
from spdsl.runtime.cache.steps import Closes, close
from spdsl.runtime.cache.storage import EntryShape, Storage
from spdsl.runtime.call.scale import scale_of_call
from spdsl.runtime.call.table import (
    Arguments,
    Inputs,
    TensorArgument,
    changed_in,
    check_sums,
    check_vectors,
    check_weights,
    prepared,
)
from spdsl.runtime.entries.entries import Cells, entry_count, entry_counts
from spdsl.runtime.launch.launch import uses_kernels
from spdsl.runtime.sequences import DTYPES, INT32_MOST, Layout, expect, expect_number, expect_tensor, on_host

_PAGES = "1, or a multiple of 16 up to 256"


class Requests:
    """The requests of a call: block_table int32 [S, width], seq_lens int [S], cu_seqlens_q int [S + 1].

    Queries cu_seqlens_q[s] to cu_seqlens_q[s + 1] of the T packed ones are those of request s. Its last one stands at
    seq_lens[s] - 1. `single`: the host knows that no request has more than one.
    """

    def __init__(
        self,
        arguments: Arguments,
        inputs: Any,
        block_table: Tensor,
        seq_lens: Tensor,
        cu_seqlens_q: Tensor,
        max_seqlen_q: int | None,
    ) -> None:
        tokens, q = _tokens_of({x.name: getattr(inputs, x.name) for x in arguments.queries}), arguments.q(inputs)
        _expect_numbers("block_table", block_table, 2, (torch.int32,), q)
        _expect_numbers("seq_lens", seq_lens, 1, (torch.int32, torch.int64), q)
        _expect_numbers("cu_seqlens_q", cu_seqlens_q, 1, (torch.int32, torch.int64), q)
        sequences = len(seq_lens)
        expect(
            len(block_table) == sequences,
            "block_table",
            "[{}, pages] like seq_lens",
            list(block_table.shape),
            sequences,
        )
        expect(block_table.stride(1) == 1, "block_table", "entries that lie side by side", block_table.stride())
        expect(len(cu_seqlens_q) == sequences + 1, "cu_seqlens_q", "{} numbers", len(cu_seqlens_q), sequences + 1)
        most = expect_number("max_seqlen_q", max_seqlen_q, "a number of tokens") if max_seqlen_q is not None else tokens
        self.table, self.longest, self.tokens = block_table, min(most, tokens), tokens
        self.spans = _spans(seq_lens.clamp(0, INT32_MOST))
        lengths = self.spans[:, 1]
        ends = cu_seqlens_q.long().clamp(0, tokens)
        # A query before the first token of its request is in none; so are all of a request without tokens.
        counts = (ends[1:] - ends[:-1]).clamp(min=0).minimum(lengths)
        self.q_spans = torch.stack([ends[1:] - counts, counts], 1).int()
        self.single = max_seqlen_q is not None and most <= 1

    def check(self, capacity: int) -> None:
        """Numbers are looked at where that costs nothing."""
        if uses_kernels(self.spans) or not on_host(self.spans):
            return
        lengths, counts = self.spans[:, 1].tolist(), self.q_spans[:, 1].tolist()
        expect(max(lengths, default=0) <= capacity, "seq_lens", f"at most {capacity} tokens", lengths[:8])
        expect(
            max(counts, default=0) <= self.longest, "max_seqlen_q", f"at least {max(counts, default=0)}", self.longest
        )


def from_pages(
    arguments: Arguments,
    inputs: Inputs,
    phase: str,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int | None,
    scale: float | None,
    *states: Any,
) -> tuple[Inputs, Storage, Layout, Requests]:
    """Of inputs with packed queries [T, heads, dim], lists of units [T, heads, n] and pages in place of keys: what a
    call over them computes with, what it reads, its layout and requests. states: those of compressed streams, as
    `_with_entries` takes them.
    """
    for x in arguments.streams:
        for name in (x.k, x.v):
            if name:
                expect_tensor(f"{name}_pages", getattr(inputs, name))
    of_call = scale_of_call(scale)
    requests = Requests(arguments, inputs, block_table, seq_lens, cu_seqlens_q, max_seqlen_q)
    own = _adopted(arguments, inputs, requests.table, requests.spans)
    requests.check(own.capacity)
    if states:
        _with_entries(own, *states)
    pages = {x.k: own.k[x.name] for x in arguments.streams} | {x.v: own.v[x.name] for x in arguments.streams if x.v}
    queries = [x.name for x in arguments.queries]
    whole = {name: getattr(inputs, name).transpose(0, 1)[None] for name in queries}
    checked = changed_in(inputs, whole | {name: x[:1] for name, x in pages.items()})
    check_vectors(arguments._replace(weights=()), checked)  # which make entries, and do not attend
    check_sums(arguments, checked, phase)
    known = [*(x.name for x in arguments.lists), *(x.name for x in arguments.chosen if x.rows == 1)]
    lists = [name for name in known if getattr(inputs, name) is not None]
    packed = {name: packed_queries(getattr(inputs, name), requests, name) for name in (*queries, *lists)}
    unread = {x.name: None for x in arguments.tensors if x.by_token and not x.kept}
    by_row = (x for x in arguments.tensors if x.by_row and getattr(inputs, x.name) is not None)
    packed |= {x.name: _rows_of_requests(x, getattr(inputs, x.name), requests) for x in by_row}
    spans = None if requests.single else requests.q_spans
    layout = Layout(spans, own.spans, None, None, requests.longest, own.capacity, *of_call)
    inputs = changed_in(inputs, pages | packed | unread)
    inputs = prepared(arguments, inputs, layout, own.capacity, own.capacity, len(own.spans))
    return inputs, own, layout, requests


def _adopted(arguments: Arguments, inputs: Any, table: Tensor, spans: Tensor) -> Storage:
    """Pages [pages, page, heads, dim] of any strides but the last, of those streams that are given."""
    own = Storage()
    streams = [x for x in arguments.streams if getattr(inputs, x.k) is not None]
    own.k = {x.name: _pages(f"{x.k}_pages", getattr(inputs, x.k)) for x in streams}
    own.v = {x.name: _pages(f"{x.v}_pages", getattr(inputs, x.v)) for x in streams if x.v}
    first = next(iter(own.k.values()))
    for stream in streams:
        for name, x in ((stream.k, own.k[stream.name]), (stream.v, own.v.get(stream.name, first))):
            same, got = x.shape[0] == first.shape[0] and x.shape[2] == first.shape[2], [x.shape[0], x.shape[2]]
            name = f"{name}_pages"
            expect(same, name, "{} pages of {} tokens like the others", got, first.shape[0], first.shape[2])
    own.page = first.shape[2]
    own.page_table, own.spans = table, spans
    own.capacity = max(1, table.shape[1] * own.page)
    own.tokens, own.token_axes, own.row_of, own.entries, own.entry_spans = {}, {}, None, {}, {}
    own.dropped = torch.zeros_like(spans[:, 0])
    return own


def _with_entries(own: Storage, cells: Mapping[str, Cells], states: Mapping[str, Tensor], state_rows: Tensor) -> None:
    """Of each compressed stream the entries, in row state_rows[s] of buffers as `state_buffers` makes them."""
    _expect_numbers("state_rows", state_rows, 1, (torch.int32, torch.int64), own.spans)
    expect(len(state_rows) == len(own.spans), "state_rows", "{} rows", len(state_rows), len(own.spans))
    own.row_of = state_rows.int()
    if not isinstance(states, Mapping):
        raise TypeError(f"states: expected what state_buffers gives, got {type(states).__name__}")
    for name, own_cells in cells.items():
        k, v = states.get(f"k.{name}"), states.get(f"v.{name}")
        for side, x in (("k", k), ("v", v)):
            if side == "k" or x is not None:
                expect_tensor(f"{side}.{name}", x)
                assert x is not None
                expect(x.dim() == 4, f"{side}.{name}", "[slots, heads, entries + 1, dim]", list(x.shape))
        assert k is not None
        own.k[name] = k
        if v is not None:
            own.v[name] = v
        own.entries[name] = EntryShape(k.shape[1], k.shape[3], 0 if v is None else v.shape[3], own_cells)
        closed = entry_counts(own.spans[:, 1], own_cells._replace(partial=False))
        own.entry_spans[name] = _spans(closed.clamp(max=k.shape[2] - 1))


def state_buffers(
    entries: Mapping[str, EntryShape], slots: int, tokens: int, device: torch.device | str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What the owner of pages keeps for compressed streams: k.<stream>, v.<stream> [slots, heads, entries + 1, dim].

    A slot is for one request of at most `tokens` tokens; its last place is never read. Buffers need not be emptied.
    """
    slots = expect_number("slots", slots, "a number >= 1", 1)
    tokens = expect_number("tokens", tokens, "a number >= 1", 1)
    found = {}
    for name, shape in entries.items():
        rows = entry_count(tokens, shape.cells) + 1
        found[f"k.{name}"] = storage_of(slots, shape.heads, rows, shape.qk_dim, device, dtype)
        if shape.v_dim:
            found[f"v.{name}"] = storage_of(slots, shape.heads, rows, shape.v_dim, device, dtype)
    return found


def close_in_pages(
    arguments: Arguments,
    inputs: Any,
    closes: Sequence[Closes],
    block_table: Tensor,
    seq_lens: Tensor,
    cells: Mapping[str, Cells],
    states: Mapping[str, Tensor],
    state_rows: Tensor,
    new_tokens: int,
) -> None:
    """Writes the entries that close with the last `new_tokens` tokens of each request, or with fewer of them."""
    like = next(x for x in (getattr(inputs, x.k) for x in arguments.streams) if x is not None)
    expect_tensor("pages", like)
    _expect_numbers("block_table", block_table, 2, (torch.int32,), like)
    _expect_numbers("seq_lens", seq_lens, 1, (torch.int32, torch.int64), like)
    new_tokens = expect_number("new_tokens", new_tokens, "a number of tokens")
    own = _adopted(arguments, inputs, block_table, _spans(seq_lens.clamp(0, INT32_MOST)))
    _with_entries(own, cells, states, state_rows)
    given = [x for x in arguments.streams if getattr(inputs, x.k) is not None]
    pages = {x.k: own.k[x.name] for x in given} | {x.v: own.v[x.name] for x in given if x.v}
    made = arguments._replace(weights=tuple(x for x in arguments.weights if x.of in pages))
    check_weights(made, changed_in(inputs, pages))
    for x in closes:
        close(own, x, new_tokens, short=True)


def _spans(lengths: Tensor) -> Tensor:
    return torch.stack([torch.zeros_like(lengths), lengths], 1).int()


def packed_queries(q: Tensor, requests: Requests, name: str = "gates") -> Tensor:
    """q [T, heads, dim] (or gates, or lists of units) as attention takes it.

    [1, heads, T, dim]; single queries [S, heads, 1, dim].
    """
    expect_tensor(name, q)
    fits = q.dim() == 3 and len(q) == requests.tokens
    expect(fits, name, "[{}, heads, ..]", list(q.shape), requests.tokens)
    if not requests.single:
        return q.transpose(0, 1)[None]
    row = requests.q_spans[:, 0].long().clamp(max=max(0, requests.tokens - 1))
    return q.index_select(0, row)[:, :, None] if len(q) else q.new_zeros(len(row), *q.shape[1:])[:, :, None]


def _rows_of_requests(tensor: TensorArgument, x: Tensor, requests: Requests) -> Tensor:
    """A tensor with a `query` axis of all T packed queries, batch 1; of single queries [S, .., 1, ..]."""
    expect_tensor(tensor.name, x)
    axis = tensor.axes.index("query") + 1
    if x.dim() == len(tensor.axes) and "token" not in tensor.axes:
        x = x[None]
    fits = x.dim() == len(tensor.axes) + 1 and (x.shape[0], x.shape[axis]) == (1, requests.tokens)
    known = {"query": "{}", "token": "any"}
    axes = ", ".join(known.get(str(axis), str(axis)) for axis in tensor.axes)
    expect(fits, tensor.name, f"[1, {axes}]", list(x.shape), requests.tokens)
    if not requests.single:
        return x
    rows = x[0].movedim(axis - 1, 0)
    row = requests.q_spans[:, 0].long().clamp(max=max(0, requests.tokens - 1))
    own = rows.index_select(0, row) if requests.tokens else rows.new_zeros(len(row), *rows.shape[1:])
    return own.unsqueeze(axis)


def unpacked(part: tuple[Tensor, Tensor], requests: Requests) -> Any:
    """-> out [T, heads, dim], lse [T, heads] (and branches of a gate)."""
    out, lse = part
    if not requests.single:
        return out[0].transpose(0, 1), lse[0].transpose(0, 1)
    counts, row = requests.q_spans[:, 1], requests.q_spans[:, 0].long()
    row = torch.where(counts > 0, row, requests.tokens)  # one place more for requests without a query
    whole = out.new_zeros(requests.tokens + 1, out.shape[1], out.shape[3]).index_copy_(0, row, out[:, :, 0])
    sums = lse.new_full((requests.tokens + 1, *lse[:, :, 0].shape[1:]), -torch.inf).index_copy_(0, row, lse[:, :, 0])
    return whole[:-1], sums[:-1]


def _pages(name: str, x: Tensor) -> Tensor:
    """[pages, page, heads, dim] -> [pages, heads, page, dim], a view."""
    expect_tensor(name, x)
    expect(x.dim() == 4, name, "4 dimensions [pages, page, heads, dim]", list(x.shape))
    page = x.shape[1]
    expect(page == 1 or (page % 16 == 0 and 16 <= page <= 256), name, f"pages of {_PAGES} tokens", page)
    expect(x.stride(3) == 1 or x.shape[3] == 1, name, "vectors that lie in one piece (last stride 1)", x.stride())
    return x.transpose(1, 2)


def _tokens_of(queries: Mapping[str, Tensor]) -> int:
    """Packed queries [T, heads, dim] -> T"""
    first_name, first = next(iter(queries.items()))
    for name, x in queries.items():
        expect_tensor(name, x)
        expect(x.dim() == 3, name, "3 dimensions [tokens, heads, dim]", list(x.shape))
        expect(x.dtype in DTYPES, name, "float16, bfloat16, float32 or float64", x.dtype)
        expect(len(x) == len(first), name, "{} tokens like {}", len(x), len(first), first_name)
    return len(first)


def _expect_numbers(name: str, x: Tensor, dims: int, dtypes: tuple[torch.dtype, ...], q: Tensor) -> None:
    expect_tensor(name, x)
    kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    expect(x.dtype in dtypes and x.dim() == dims, name, f"{kinds}, {dims}-dimensional", (x.dtype, list(x.shape)))
    expect(x.device == q.device, name, f"device {q.device}", x.device)
