"""Launching the kernels of a choice that is cut: tiles, pieces of bounded size, constants."""

from __future__ import annotations

import struct
from collections.abc import Callable

import torch
from torch import Tensor

from spdsl.runtime.language import tl
from spdsl.runtime.launch.launch import INTERPRETED, Paged, call_of, launch, strided
from spdsl.runtime.select.cut import CutConst, CutTiles, cut_lists
from spdsl.runtime.select.cut_bits import NOT_CUT
from spdsl.runtime.sequences import Layout
from spdsl.runtime.tuning.configs import power_of_2
from spdsl.runtime.tuning.unit_configs import UnitShape, cut_pieces

# Units of a list that one program looks at at once, and those of one warp: with more of them it spills on sm_80.
_CHUNK, _OF_WARP = 512, 64


def cut_constants(
    shape: UnitShape, unit: int, rows: int, least: int, level: float | None, stride: int, first: int,
    entries: int, splits: int, causal: bool, units: int, part: float = 0.0, below: bool = False,
    tiled: bool = False, cell: int = 1,
) -> CutConst:  # fmt: skip
    """As `select_constants`, for lists of `rows` queries, `tiled`: written once. Without `least` what is below `level`
    has no bits at all.
    """
    passing = NOT_CUT.value if level is None or least == 0 else level_bits(level) - 1
    chunk = max(16, min(_CHUNK, power_of_2(units)))
    values = (
        unit, rows, shape.lanes, max(shape.config.block_n, 16), least, passing, unit // stride, first, entries,
        splits, causal, 16 if INTERPRETED else chunk, part, below, tiled, cell,
    )  # fmt: skip
    return CutConst(*(tl.constexpr(value) for value in values))


def level_bits(level: float) -> int:
    """`score_bits` of the level; -0 is 0."""
    bits: int = struct.unpack("<i", struct.pack("<f", level + 0.0))[0]
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def tiles_of_rows(q: Tensor, layout: Layout, rows: int, lanes: int) -> tuple[Tensor | None, int, int, int]:
    """-> the number of each sequence's first tile (None: all have equally many), how many that are, sequences, tiles.

    A tile of lists of several rows may hold rows at the end of one and at the start of the next; one of all rows (0) is
    alone.
    """
    if rows == 0:
        sequences = q.shape[0] if layout.q_spans is None else len(layout.q_spans)
        return None, 1, sequences, sequences
    step, more = (lanes, lanes - 1) if rows == 1 else (rows, 2 * rows - 2)
    sequences = q.shape[0] if layout.q_spans is None else len(layout.q_spans)
    if layout.q_spans is None or q.shape[0] == sequences:
        each = (q.shape[2] + more) // step if q.shape[2] else 0
        return None, each, sequences, each * sequences
    counts = (layout.q_spans[:, 1] + more) // step
    return (counts.cumsum(0) - counts).int(), 0, sequences, (q.shape[2] + more * sequences) // step


def most_units(q: Tensor, layout: Layout, unit: int, paged: Paged | None = None) -> int:
    """Of the longest sequence, from host numbers alone; at least 1."""
    whole = layout.q_spans is None or paged is not None  # `longest` are rows where keys lie in a cache
    length = layout.keys if whole else min(layout.keys, layout.longest)
    if layout.q_offset is not None:
        length = max((layout.k_offset or 0) + length, layout.q_offset + q.shape[2])
    return max(1, -(-length // unit))


def cut_units(
    score: Callable[[Tensor, CutTiles, int], None], found: Tensor, q: Tensor, layout: Layout, S: CutConst, width: int,
    limits: Tensor | None = None, room: int = 0,
) -> None:  # fmt: skip
    """Fills the lists `found` [B, lists, N, most] of the rows of all sequences, a piece of bounded size at a time; of
    tiles [sequences, lists, row tiles, most].

    width: units of the longest sequence. score(bits, tiles, many) launches the kernel that scores `many` tiles.
    limits: of `list_limits`, in place of the constants. room: numbers that `score` has in memory for a tile.
    """
    first, each, sequences, many = tiles_of_rows(q, layout, S.ROWS.value, S.LANES.value)
    lists = found.shape[1]
    own = S.LANES.value if S.ROWS.value == 1 else 1  # lists of a tile
    for begin, end in cut_pieces(many, max(lists * own * width, room), INTERPRETED):
        rows = (end - begin) * own
        bits = torch.empty(lists, rows, width, dtype=torch.int32, device=q.device)
        tiles = CutTiles(first, each, sequences, begin, rows, width, found.shape[3])
        score(bits, tiles, end - begin)
        launch(
            cut_lists, (rows, lists), bits, strided(found, sequences), call_of(q, layout), tiles, S, limits,
            num_warps=max(1, S.CHUNK.value // _OF_WARP), num_stages=1,
        )  # fmt: skip
