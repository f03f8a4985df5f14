"""Where the sequences of a call lie, and the checks of arguments that every entry point shares."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


def expect(holds: bool, name: str, expected: str, got: object, *filled: object) -> None:
    """Raises ValueError `name: expected ..., got ...` unless `holds`; `filled` stands for each {} of `expected`.

    Text is made of sizes only when it is needed: torch.compile would take a size that is printed for a constant, and
    compile again for every length.
    """
    if not holds:
        raise ValueError(f"{name}: expected {expected.format(*filled)}, got {got}")


def expect_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")


class Layout(NamedTuple):
    """The sequences of a call.

    Dense: neither spans nor offsets; sequence s is batch row s, its last query stands at its last key.
    Spans [S, 2] = (start, count), int32: packed sequences (batch 1) or padded ones (batch S).
    Offsets: row i has position q_offset + i, key j k_offset + j (one part of a longer sequence).
    """

    q_spans: Tensor | None
    k_spans: Tensor | None
    q_offset: int | None
    k_offset: int | None
    longest: int  # rows, and with spans also keys, of the longest sequence, or more
    keys: int  # tokens of a batch row of keys


class Corner(NamedTuple):
    """One sequence (or a dense batch of them) as slices, and the positions of its first row and key.

    `keys` are entries of the stream that is read, `tokens` the tokens that they stand for.
    """

    sequences: slice
    batch: slice
    rows: slice
    keys: slice
    tokens: slice
    q_origin: int
    k_origin: int
    length: int


def layout_of(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    lengths: Tensor | None,
    q_offset: int | None,
    k_offset: int | None,
) -> Layout:
    """The layout that the arguments of a call describe. Raises ValueError on contradictions."""
    given = [cu_seqlens is not None, lengths is not None, q_offset is not None or k_offset is not None]
    expect(sum(given) <= 1, "cu_seqlens, lengths, q_offset", "at most one of them", sum(given))
    if cu_seqlens is not None:
        expect(q.shape[0] == 1, "q", "batch 1 with cu_seqlens", q.shape[0])
        expect(q.shape[2] == k.shape[2], "k", "{} tokens like q, with cu_seqlens", k.shape[2], q.shape[2])
        expect_tensor("cu_seqlens", cu_seqlens)
        whole = cu_seqlens.dim() == 1 and cu_seqlens.dtype in (torch.int32, torch.int64) and len(cu_seqlens) > 1
        expect(whole, "cu_seqlens", "int [sequences + 1]", (cu_seqlens.dtype, cu_seqlens.shape))
        expect(cu_seqlens.device == q.device, "cu_seqlens", f"device {q.device}", cu_seqlens.device)
        spans = torch.stack([cu_seqlens[:-1], cu_seqlens[1:] - cu_seqlens[:-1]], 1).int()
        longest = q.shape[2] if max_seqlen is None else max_seqlen
        return Layout(spans, spans, None, None, longest, k.shape[2])
    expect(max_seqlen is None, "max_seqlen", "None without cu_seqlens", max_seqlen)
    if lengths is not None:
        expect_tensor("lengths", lengths)
        whole = lengths.dim() == 1 and len(lengths) == q.shape[0] and lengths.dtype in (torch.int32, torch.int64)
        expect(whole, "lengths", "int [{}]", (lengths.dtype, lengths.shape), q.shape[0])
        expect(lengths.device == q.device, "lengths", f"device {q.device}", lengths.device)
        q_spans = _at_the_end(lengths, q.shape[2])
        k_spans, longest = _at_the_end(lengths, k.shape[2]), max(q.shape[2], k.shape[2])
        return Layout(q_spans, k_spans, None, None, longest, k.shape[2])
    if q_offset is None and k_offset is None:
        return Layout(None, None, None, None, q.shape[2], k.shape[2])
    expect(q_offset is not None and k_offset is not None, "q_offset, k_offset", "both of them", "one")
    expect(k_offset is None or k_offset >= 0, "k_offset", "a position >= 0", k_offset)
    return Layout(None, None, q_offset, k_offset, q.shape[2], k.shape[2])


def sizes_of(q: Tensor, k: Tensor, layout: Layout) -> tuple[int, int]:
    """Entries of a token axis, and the end of all positions: both count from position 0 of the whole sequence."""
    if layout.q_offset is None or layout.k_offset is None:
        return k.shape[2], k.shape[2]
    end = _length(layout.q_offset, layout.k_offset, q.shape[2], k.shape[2])
    return end, end


def _at_the_end(lengths: Tensor, size: int) -> Tensor:
    """Left padding: the last `lengths` tokens of `size` are real."""
    counts = lengths.clamp(0, size)
    return torch.stack([size - counts, counts], 1).int()


def corners(q: Tensor, layout: Layout) -> Iterator[Corner]:
    """The sequences one by one; a dense batch is one corner. Reads the spans on the host (CPU tensors)."""
    if layout.k_spans is None:
        rows, keys = q.shape[2], layout.keys
        q_origin = keys - rows if layout.q_offset is None else layout.q_offset
        k_origin = layout.k_offset or 0
        length = _length(q_origin, k_origin, rows, keys)
        tokens = slice(0, keys)
        yield Corner(slice(None), slice(None), slice(0, rows), tokens, tokens, q_origin, k_origin, length)
        return
    k_spans = layout.k_spans.tolist()
    q_spans = [[0, q.shape[2]]] * len(k_spans) if layout.q_spans is None else layout.q_spans.tolist()
    _expect_inside(q_spans, q.shape[2], layout)
    for s, (q_span, k_span) in enumerate(zip(q_spans, k_spans, strict=True)):
        batch = slice(None) if q.shape[0] == 1 else slice(s, s + 1)
        row_slice, key_slice = slice(q_span[0], sum(q_span)), slice(k_span[0], sum(k_span))
        yield Corner(slice(s, s + 1), batch, row_slice, key_slice, key_slice, k_span[1] - q_span[1], 0, k_span[1])


def _expect_inside(spans: list[list[int]], rows: int, layout: Layout) -> None:
    """What only the host can check: spans one after the other, inside the tensor, none longer than stated."""
    inside = all(start >= 0 and count >= 0 and start + count <= rows for start, count in spans)
    expect(inside, "cu_seqlens", f"rising numbers from 0 to at most {rows}", f"[start, count] {spans[:8]}")
    longest = max((count for _, count in spans), default=0)
    expect(layout.q_spans is None or longest <= layout.longest, "max_seqlen", f"at least {longest}", layout.longest)


def _length(q_origin: int, k_origin: int, rows: int, keys: int) -> int:
    """Keys of the whole sequence, as far as this call knows: up to its last key or its last query."""
    return max(k_origin + keys, q_origin + rows)
