"""Device functions that say which blocks of keys a tile visits, and where they lie."""

from __future__ import annotations

from spdsl.runtime.language import tl
from spdsl.runtime.tiles.kernel import Keys, ListVisit, Range, jit
from spdsl.runtime.tiles.positions import span
from spdsl.runtime.tiles.tiles import at

# A range of elements becomes blocks first..end, with full blocks (no mask) full_first..full_end inside:
#
#     first ... full_first ... full_end ... end
#        partial        full         partial
#
# Every kernel has two loops, over the full and over the partial blocks of all ranges together: one loop for each piece
# would repeat the loop body three times for each range, which costs instruction cache, registers and compile time.
# disable_licm: code hoisted out of one loop occupies registers during the other, too, and dK/dV would spill.


@jit
def to_blocks(first, end, full_first, full_end, cursor, count, BLOCK: tl.constexpr):
    """Elements -> blocks, clipped to 0..count, without the blocks before `cursor`; -> Range, new cursor.

    Ranges come ordered by `first` and may overlap: `cursor` is the first block that no range has taken yet.
    Bounds are clamped at 0 before they are divided, because // rounds toward zero.
    """
    end = tl.minimum(end, count)
    first = tl.maximum(first, 0)
    first_block = tl.where(first < end, tl.maximum(first // BLOCK, cursor), cursor)
    end_block = tl.where(first < end, tl.maximum(tl.cdiv(end, BLOCK), first_block), cursor)
    full_first_block = tl.cdiv(tl.maximum(full_first, 0), BLOCK)
    full_first_block = tl.minimum(tl.maximum(full_first_block, first_block), end_block)
    full_end_block = tl.maximum(tl.minimum(full_end, count), 0) // BLOCK
    full_end_block = tl.minimum(tl.maximum(full_end_block, full_first_block), end_block)
    return Range(first_block, full_first_block, full_end_block, end_block), end_block


@jit
def visit_lists(lists, s, h, tile):
    """The full and the partial blocks listed for a tile of sequence s and head h."""
    entry = tl.cast(s, tl.int64) * lists.sequence + tl.cast(h, tl.int64) * lists.head + tile
    offset = entry * lists.width
    full, partial = tl.load(lists.full_count + entry), tl.load(lists.partial_count + entry)
    return ListVisit(full, partial, lists.full + offset, lists.partial + offset)


@jit
def jump(block, gap_first, gap_end):
    """Blocks from gap_first on move behind the gap."""
    return block + tl.where(block >= gap_first, gap_end - gap_first, 0)


@jit
def sequence_length(call, s):
    """`length` of the pattern: the end of all positions of a sequence that this call knows."""
    _, length = span(call.k_spans, s, call.k_count)
    if call.k_offset is not None:
        length = call.k_offset + length
    if call.q_offset is not None:  # the part of a longer sequence
        length = tl.maximum(length, call.q_offset + call.q_count)
    return length


@jit
def sequence_keys(source, s, h, call, C):
    """The keys that query head h of sequence s reads."""
    start, count = span(source.spans, s, source.keys)
    origin = 0
    if call.k_offset is not None:
        origin = call.k_offset
    pages = 0  # a jit function of triton 3.6 cannot return a None
    entry = s
    if C.PAGE:  # the batch dimension holds pages, found through row s of the page table
        pages = source.pages + tl.cast(s, tl.int64) * source.page_width
        entry = 0
    head = h // source.GROUP
    length = sequence_length(call, s)
    return Keys(at(source.k, entry, head, start), at(source.v, entry, head, start), pages, origin, count, length)
