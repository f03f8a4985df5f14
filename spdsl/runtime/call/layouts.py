"""What a call says beside its tensors, and the layout of its sequences that follows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from spdsl.runtime.call.scale import scale_of_call
from spdsl.runtime.sequences import INT32_MOST, Layout, expect, expect_number, expect_tensor, on_host

SIDES = ("left", "right")


class Options(NamedTuple):
    """What a call says beside its tensors. Packed, padded, or a part of a sequence: one of them at most.

    cu_seqlens, max_seqlen: packed sequences; cu_seqlens_k, max_seqlen_k: their keys, if they have another number of
    them. lengths: real tokens of padded rows; side: the one on which tokens are missing. q_offset, k_offset: positions
    of the first query and key. scale: in place of 1 / sqrt(dim).
    """

    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_k: int | None = None
    lengths: Tensor | None = None
    side: str = "left"
    q_offset: int | None = None
    k_offset: int | None = None
    scale: float | None = None


def checked_layout(q: Tensor, k: Tensor, options: Options) -> Layout:
    """As `layout_of`, with a look at the numbers of sequences where that costs nothing."""
    layout = layout_of(q, k, options)
    if options.cu_seqlens is not None and on_host(options.cu_seqlens):
        _expect_rising("cu_seqlens", options.cu_seqlens.tolist(), q.shape[2], options.max_seqlen, "max_seqlen")
    if options.cu_seqlens_k is not None and on_host(options.cu_seqlens_k):
        _expect_rising("cu_seqlens_k", options.cu_seqlens_k.tolist(), k.shape[2], options.max_seqlen_k, "max_seqlen_k")
    if options.lengths is not None and on_host(options.lengths):
        outside = [length for length in options.lengths.tolist() if not 0 <= length <= layout.longest]
        expect(not outside, "lengths", "numbers from 0 to {}", outside[:8], layout.longest)
    return layout


def layout_of(q: Tensor, k: Tensor, options: Options) -> Layout:
    """The layout that a call describes. Raises ValueError on contradictions."""
    cu_seqlens, lengths, q_offset, k_offset = options.cu_seqlens, options.lengths, options.q_offset, options.k_offset
    given = [cu_seqlens is not None, lengths is not None, q_offset is not None or k_offset is not None]
    expect(sum(given) <= 1, "cu_seqlens, lengths, q_offset", "at most one of them", sum(given))
    known, traced = scale_of_call(options.scale)
    _expect_companions(options)
    if cu_seqlens is not None:
        layout = _packed(q, k, options)
    elif lengths is not None:
        layout = _padded(q, k, lengths, options.side)
    elif q_offset is None and k_offset is None:
        layout = Layout(None, None, None, None, q.shape[2], k.shape[2])
    elif q_offset is None or k_offset is None:
        raise ValueError("q_offset, k_offset: expected both of them, got one")
    else:
        q_offset = expect_number("q_offset", q_offset, "a position >= 0", 0, INT32_MOST - q.shape[2])
        k_offset = expect_number("k_offset", k_offset, "a position >= 0", 0, INT32_MOST - k.shape[2])
        layout = Layout(None, None, q_offset, k_offset, q.shape[2], k.shape[2])
    return layout._replace(scale=known, traced_scale=traced)


def _expect_companions(options: Options) -> None:
    """What says more of another argument comes with it."""
    max_seqlen, max_seqlen_k, packed = options.max_seqlen, options.max_seqlen_k, options.cu_seqlens is not None
    expect(packed or max_seqlen is None, "max_seqlen", "None without cu_seqlens", max_seqlen)
    expect(packed or options.cu_seqlens_k is None, "cu_seqlens_k", "None without cu_seqlens", "some")
    fits = options.cu_seqlens_k is not None or max_seqlen_k is None
    expect(fits, "max_seqlen_k", "None without cu_seqlens_k", max_seqlen_k)
    expect(options.side in SIDES, "side", '"left" or "right"', repr(options.side))
    expect(options.lengths is not None or options.side == "left", "side", '"left" without lengths', options.side)


def _packed(q: Tensor, k: Tensor, options: Options) -> Layout:
    """Sequences one after the other in one batch row; the last query of each stands at its last key."""
    expect(q.shape[0] == 1, "q", "batch 1 with cu_seqlens", q.shape[0])
    spans = _spans_of("cu_seqlens", options.cu_seqlens, q, q.shape[2])
    longest = q.shape[2] if options.max_seqlen is None else _longest("max_seqlen", options.max_seqlen, q.shape[2])
    if options.cu_seqlens_k is None:
        same = q.shape[2] == k.shape[2]
        expect(same, "k", "{} tokens like q, with cu_seqlens (or pass cu_seqlens_k)", k.shape[2], q.shape[2])
        return Layout(spans, spans, None, None, longest, k.shape[2])
    k_spans = _spans_of("cu_seqlens_k", options.cu_seqlens_k, q, k.shape[2])
    expect(len(k_spans) == len(spans), "cu_seqlens_k", "{} numbers like cu_seqlens", len(k_spans) + 1, len(spans) + 1)
    most = k.shape[2] if options.max_seqlen_k is None else _longest("max_seqlen_k", options.max_seqlen_k, k.shape[2])
    return Layout(spans, k_spans, None, None, max(longest, most), k.shape[2])


def _padded(q: Tensor, k: Tensor, lengths: Tensor, side: str) -> Layout:
    """A sequence in each batch row, of which `lengths` tokens are real: the last ones, or with `right` the first."""
    _expect_numbers("lengths", lengths, "int [{}]", q)
    expect(len(lengths) == q.shape[0], "lengths", "int [{}]", (lengths.dtype, lengths.shape), q.shape[0])
    most = max(q.shape[2], k.shape[2])
    q_spans, k_spans = (_at_one_side(lengths, size, most, side) for size in (q.shape[2], k.shape[2]))
    return Layout(q_spans, k_spans, None, None, most, k.shape[2])


def _expect_numbers(name: str, x: object, expected: str, q: Tensor) -> None:
    """int [n] on the device of q."""
    expect_tensor(name, x)
    assert isinstance(x, Tensor)
    whole = x.dim() == 1 and x.dtype in (torch.int32, torch.int64)
    expect(whole, name, expected, (x.dtype, x.shape), q.shape[0])
    expect(x.device == q.device, name, f"device {q.device}", x.device)


def _longest(name: str, most: int, tokens: int) -> int:
    if torch.compiler.is_compiling():  # it may be a number that nobody knows yet
        return most
    return min(expect_number(name, most, "a number of tokens"), tokens)


def _expect_rising(name: str, ends: Sequence[int], tokens: int, longest: int | None, longest_name: str) -> None:
    rising = ends[0] == 0 and ends[-1] <= tokens and all(first <= end for first, end in pairwise(ends))
    expect(rising, name, f"rising numbers from 0 to at most {tokens}", ends[:8])
    most = max(end - first for first, end in pairwise(ends))
    expect(longest is None or most <= longest, longest_name, f"at least {most}", longest)


def _spans_of(name: str, ends: Tensor | None, q: Tensor, tokens: int) -> Tensor:
    """Spans (start, count), int32. On the CPU wrong ones stay wrong, and are seen where they are read; on a GPU,
    where nobody looks, they are brought into the tensor."""
    _expect_numbers(name, ends, "int [sequences + 1]", q)
    assert ends is not None
    expect(len(ends) > 1, name, "int [sequences + 1]", (ends.dtype, ends.shape))
    ends = ends.long()
    if ends.device.type != "cpu":
        ends = ends.clamp(0, tokens).cummax(0).values
    spans = torch.stack([ends[:-1], ends[1:] - ends[:-1]], 1)
    return spans.clamp(-INT32_MOST, INT32_MOST).int()


def _at_one_side(lengths: Tensor, size: int, most: int, side: str) -> Tensor:
    """Padding: `lengths` of `size` tokens are real, the last ones or the first. Wrong ones as in `_spans_of`."""
    counts = lengths.clamp(0, size)
    if lengths.device.type == "cpu":
        counts = counts.masked_fill((lengths < 0) | (lengths > most), -1)
    starts = size - counts if side == "left" else torch.zeros_like(counts)
    return torch.stack([starts, counts], 1).int()
