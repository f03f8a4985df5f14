"""Where the entries of a compressed stream lie, for each sequence of a call; and their keys as kernels see them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from spdsl.runtime.entries.entries import Cells, entry_count, entry_spans
from spdsl.runtime.language import tl
from spdsl.runtime.launch.launch import Paged, rows_contiguous, strided
from spdsl.runtime.sequences import Corner, Layout, corners, expect
from spdsl.runtime.tiles.kernel import Source


def entry_corners(q: Tensor, layout: Layout, cells: Cells, in_cache: bool = False) -> Iterator[Corner]:
    """As `corners`, with the entries of each sequence in place of its tokens. In a cache all of them start at 0."""
    spans = entry_layout(q, layout, cells).k_spans
    if in_cache and layout.k_spans is not None:
        spans = entry_spans(layout.k_spans, cells, packed=False)
    for s, corner in enumerate(corners(q, layout)):
        tokens = corner.tokens.stop - corner.tokens.start
        start, count = (0, entry_count(tokens, cells)) if spans is None else spans[s].tolist()
        yield corner._replace(keys=slice(start, start + count), k_origin=0)


def entry_layout(q: Tensor, layout: Layout, cells: Cells) -> Layout:
    """The layout with spans of entries. A part of a longer sequence must start at its first token."""
    expect(not layout.k_offset, "k_offset", "0 where keys are compressed", layout.k_offset)
    if layout.k_spans is None:
        return layout
    packed = layout.q_spans is not None and q.shape[0] == 1
    return layout._replace(k_spans=entry_spans(layout.k_spans, cells, packed))


def entry_source(
    q: Tensor, k: Tensor, v: Tensor, sequences: int, layout: Layout, cells: Cells, paged: Paged | None = None
) -> Source:
    """Compressed keys for a kernel; a cache knows how many there are, and in which row they lie."""
    k, v = rows_contiguous(k), rows_contiguous(v)
    spans = entry_layout(q, layout, cells).k_spans if paged is None else paged.spans
    group = tl.constexpr(q.shape[1] // k.shape[1])
    if paged is not None and paged.table is not None:
        return Source(strided(k), strided(v), 0, spans, paged.table, paged.table.stride(0), group)
    return Source(strided(k, sequences), strided(v, sequences), k.shape[2], spans, None, 0, group)
