"""Where the sequences of a call lie, and the checks of arguments that every entry point shares."""

from __future__ import annotations

from collections.abc import Iterator
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
    """The sequences of a call, and its scale.

    Dense: neither spans nor offsets; sequence s is batch row s, its last query stands at its last key.
    Spans [S, 2] = (start, count), int32: packed sequences (batch 1) or padded ones (batch S).
    Offsets: row i has position q_offset + i, key j k_offset + j (one part of a longer sequence).
    Where rows are cells of queries, they have numbers for positions: from q_offset on, or from q_origins int32 [S].
    """

    q_spans: Tensor | None
    k_spans: Tensor | None
    q_offset: int | None
    k_offset: int | None
    longest: int  # rows, and with spans also keys, of the longest sequence, or more
    keys: int  # tokens of a batch row of keys
    scale: float | None = None  # in place of 1 / sqrt(dim)
    traced_scale: Tensor | None = None  # the same, float64 [] of the host, where PyTorch traces and does not know it
    q_origins: Tensor | None = None


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
    scale: float | Tensor | None = None  # of the call


def sizes_of(q: Tensor, k: Tensor, layout: Layout) -> tuple[int, int]:
    """Entries of a token axis, and the end of all positions: both count from position 0 of the whole sequence."""
    if layout.q_offset is None or layout.k_offset is None:
        return k.shape[2], k.shape[2]
    end = _length(layout.q_offset, layout.k_offset, q.shape[2], k.shape[2])
    return end, end


def length_of(q: Tensor, k: Tensor, layout: Layout) -> Tensor | int:
    """`length` of the pattern: one for all, or of each sequence."""
    return sizes_of(q, k, layout)[1] if layout.k_spans is None else layout.k_spans[:, 1]


def corners(q: Tensor, layout: Layout) -> Iterator[Corner]:
    """The sequences one by one; a dense batch is one corner. Reads the spans on the host (CPU tensors)."""
    scale = layout.traced_scale if layout.scale is None else layout.scale
    if layout.k_spans is None:
        rows, keys = q.shape[2], layout.keys
        q_origin = keys - rows if layout.q_offset is None else layout.q_offset
        k_origin = layout.k_offset or 0
        length = _length(q_origin, k_origin, rows, keys)
        tokens = slice(0, keys)
        yield Corner(slice(None), slice(None), slice(0, rows), tokens, tokens, q_origin, k_origin, length, scale)
        return
    k_spans = layout.k_spans.tolist()
    q_spans = [[0, q.shape[2]]] * len(k_spans) if layout.q_spans is None else layout.q_spans.tolist()
    _expect_inside("cu_seqlens, lengths", q_spans, q.shape[2])
    _expect_inside("cu_seqlens_k, lengths", k_spans, layout.keys)
    if layout.q_spans is not None:
        longest = max((count for _, count in q_spans), default=0)
        expect(longest <= layout.longest, "max_seqlen", f"at least {longest}", layout.longest)
    origins = [k_span[1] - q_span[1] for q_span, k_span in zip(q_spans, k_spans, strict=True)]
    if layout.q_origins is not None:
        origins = layout.q_origins.tolist()
    for s, (q_span, k_span) in enumerate(zip(q_spans, k_spans, strict=True)):
        batch = slice(None) if q.shape[0] == 1 else slice(s, s + 1)
        row_slice, key_slice = slice(q_span[0], sum(q_span)), slice(k_span[0], sum(k_span))
        place = (slice(s, s + 1), batch, row_slice, key_slice, key_slice, origins[s], 0, k_span[1])
        yield Corner(*place, scale)


def _expect_inside(name: str, spans: list[list[int]], tokens: int) -> None:
    """What only the host can check: spans inside of the tensor."""
    inside = all(start >= 0 and count >= 0 and start + count <= tokens for start, count in spans)
    expect(inside, name, f"rising numbers from 0 to at most {tokens}", f"[start, count] {spans[:8]}")


def _length(q_origin: int, k_origin: int, rows: int, keys: int) -> int:
    """Keys of the whole sequence, as far as this call knows: up to its last key or its last query."""
    return max(k_origin + keys, q_origin + rows)
