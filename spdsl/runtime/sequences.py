"""Where the sequences of a call lie, and the checks of arguments that every entry point shares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INT32_MOST = 2**31 - 1


def expect(holds: bool, name: str, expected: str, got: object, *filled: object) -> None:
    """Raises ValueError `name: expected ..., got ...` unless `holds`; `filled` stands for each {} of `expected`.

    Text is made of sizes only when it is needed: torch.compile would take a size that is printed for a constant, and
    compile again for every length.
    """
    if not holds:
        raise ValueError(f"{name}: expected {expected.format(*filled)}, got {got}")


def expect_tensor(name: str, x: object) -> None:
    """A tensor that lies in memory as its strides say, and of which no derivative is asked that there is not."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.layout != torch.strided or x.is_nested or x.is_quantized:
        kind = "a nested one" if x.is_nested else f"a quantized one, {x.dtype}" if x.is_quantized else str(x.layout)
        raise TypeError(f"{name}: expected a dense tensor, got {kind}")
    if not torch.compiler.is_compiling():
        refuse_transform(name, x)


def refuse_transform(name: str, x: Tensor) -> None:
    """Derivatives that do not pass a custom operator; without this check forward-mode ones would come out as 0."""
    if forward_ad.unpack_dual(x).tangent is not None:
        raise NotImplementedError(f"{name}: no forward-mode derivative (jvp); use backward")
    if asked_of_functorch("is_gradtrackingtensor", x):
        raise NotImplementedError(f"{name}: no derivative by torch.func (grad, vjp, jacrev); use backward")


def asked_of_functorch(question: str, x: Tensor) -> bool:
    """Private to PyTorch: a version without the question has to say by itself what it cannot do."""
    answer = getattr(getattr(torch._C, "_functorch", None), question, None)
    return answer is not None and bool(answer(x))


def expect_number(name: str, x: object, expected: str, least: int = 0, most: int = INT32_MOST) -> int:
    """x as an int between the bounds. Raises TypeError for a bool, a float or a tensor, ValueError out of bounds."""
    if isinstance(x, bool) or not isinstance(x, int | torch.SymInt | Integral):
        raise TypeError(f"{name}: expected {expected}, got {type(x).__name__}")
    number: Any = x if isinstance(x, int | torch.SymInt) else int(x)
    expect(least <= number <= most, name, expected, number)
    return number  # type: ignore[no-any-return]


def expect_flag(name: str, x: object) -> None:
    if not isinstance(x, bool):
        raise TypeError(f"{name}: expected True or False, got {type(x).__name__}")


def expect_dtype(dtype: object) -> None:
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype, got {type(dtype).__name__}")
    expect(dtype in DTYPES, "dtype", "float16, bfloat16, float32 or float64", dtype)


def on_host(x: Tensor) -> bool:
    """Whether its values are there to be looked at: not on a GPU, nor while PyTorch traces or maps."""
    plain = x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling()
    return plain and not asked_of_functorch("is_functorch_wrapped_tensor", x)


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


def checked_layout(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    lengths: Tensor | None,
    q_offset: int | None,
    k_offset: int | None,
) -> Layout:
    """As `layout_of`, with a look at the numbers of sequences where that costs nothing."""
    layout = layout_of(q, k, cu_seqlens, max_seqlen, lengths, q_offset, k_offset)
    if cu_seqlens is not None and on_host(cu_seqlens):
        _expect_rising(cu_seqlens.tolist(), q.shape[2], layout.longest)
    if lengths is not None and on_host(lengths):
        outside = [length for length in lengths.tolist() if not 0 <= length <= layout.longest]
        expect(not outside, "lengths", "numbers from 0 to {}", outside[:8], layout.longest)
    return layout


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
        _expect_numbers("cu_seqlens", cu_seqlens, "int [sequences + 1]", q)
        expect(len(cu_seqlens) > 1, "cu_seqlens", "int [sequences + 1]", (cu_seqlens.dtype, cu_seqlens.shape))
        longest = q.shape[2] if max_seqlen is None else _longest(max_seqlen, q.shape[2])
        spans = _between(cu_seqlens, q.shape[2])
        return Layout(spans, spans, None, None, longest, k.shape[2])
    expect(max_seqlen is None, "max_seqlen", "None without cu_seqlens", max_seqlen)
    if lengths is not None:
        _expect_numbers("lengths", lengths, "int [{}]", q)
        expect(len(lengths) == q.shape[0], "lengths", "int [{}]", (lengths.dtype, lengths.shape), q.shape[0])
        most = max(q.shape[2], k.shape[2])
        q_spans, k_spans = (_at_the_end(lengths, size, most) for size in (q.shape[2], k.shape[2]))
        return Layout(q_spans, k_spans, None, None, most, k.shape[2])
    if q_offset is None and k_offset is None:
        return Layout(None, None, None, None, q.shape[2], k.shape[2])
    if q_offset is None or k_offset is None:
        raise ValueError("q_offset, k_offset: expected both of them, got one")
    q_offset = expect_number("q_offset", q_offset, "a position >= 0", 0, INT32_MOST - q.shape[2])
    k_offset = expect_number("k_offset", k_offset, "a position >= 0", 0, INT32_MOST - k.shape[2])
    return Layout(None, None, q_offset, k_offset, q.shape[2], k.shape[2])


def _expect_numbers(name: str, x: Tensor, expected: str, q: Tensor) -> None:
    """int [n] on the device of q."""
    expect_tensor(name, x)
    whole = x.dim() == 1 and x.dtype in (torch.int32, torch.int64)
    expect(whole, name, expected, (x.dtype, x.shape), q.shape[0])
    expect(x.device == q.device, name, f"device {q.device}", x.device)


def _longest(max_seqlen: int, tokens: int) -> int:
    if torch.compiler.is_compiling():  # it may be a number that nobody knows yet
        return max_seqlen
    return min(expect_number("max_seqlen", max_seqlen, "a number of tokens"), tokens)


def _expect_rising(ends: Sequence[int], tokens: int, longest: int) -> None:
    rising = ends[0] == 0 and ends[-1] <= tokens and all(first <= end for first, end in pairwise(ends))
    expect(rising, "cu_seqlens", f"rising numbers from 0 to at most {tokens}", ends[:8])
    most = max(end - first for first, end in pairwise(ends))
    expect(most <= longest, "max_seqlen", f"at least {most}", longest)


def _between(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Spans (start, count), int32. On the CPU wrong ones stay wrong, and are seen where they are read; on a GPU,
    where nobody looks, they are brought into the tensor."""
    ends = cu_seqlens.long()
    if ends.device.type != "cpu":
        ends = ends.clamp(0, tokens).cummax(0).values
    spans = torch.stack([ends[:-1], ends[1:] - ends[:-1]], 1)
    return spans.clamp(-INT32_MOST, INT32_MOST).int()


def sizes_of(q: Tensor, k: Tensor, layout: Layout) -> tuple[int, int]:
    """Entries of a token axis, and the end of all positions: both count from position 0 of the whole sequence."""
    if layout.q_offset is None or layout.k_offset is None:
        return k.shape[2], k.shape[2]
    end = _length(layout.q_offset, layout.k_offset, q.shape[2], k.shape[2])
    return end, end


def length_of(q: Tensor, k: Tensor, layout: Layout) -> Tensor | int:
    """`length` of the pattern: one for all, or of each sequence."""
    return sizes_of(q, k, layout)[1] if layout.k_spans is None else layout.k_spans[:, 1]


def _at_the_end(lengths: Tensor, size: int, most: int) -> Tensor:
    """Left padding: the last `lengths` tokens of `size` are real. Wrong ones as in `_between`."""
    counts = lengths.clamp(0, size)
    if lengths.device.type == "cpu":
        counts = counts.masked_fill((lengths < 0) | (lengths > most), -1)
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
    """What only the host can check: spans inside of the tensor, none longer than stated."""
    inside = all(start >= 0 and count >= 0 and start + count <= rows for start, count in spans)
    name, expected = "cu_seqlens, lengths", f"rising numbers from 0 to at most {rows}"
    expect(inside, name, expected, f"[start, count] {spans[:8]}")
    longest = max((count for _, count in spans), default=0)
    expect(layout.q_spans is None or longest <= layout.longest, "max_seqlen", f"at least {longest}", layout.longest)


def _length(q_origin: int, k_origin: int, rows: int, keys: int) -> int:
    """Keys of the whole sequence, as far as this call knows: up to its last key or its last query."""
    return max(k_origin + keys, q_origin + rows)
