"""Launching kernels that skip tiles. What a tile is belongs to the meaning, so no tuning changes its sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from spdsl.runtime.call.lists import Tiles, sequence_counts, tiles_of
from spdsl.runtime.launch.launch import INTERPRETED, Paged, page_of
from spdsl.runtime.sequences import Layout
from spdsl.runtime.skip.notes import row_tiles_of
from spdsl.runtime.tuning.configs import Config, block_room, power_of_2
from spdsl.runtime.tuning.gpu import gpu_of

MOST_ROWS = 256  # of a program: heads that vote together are rows of one tile


def skip_config(q: Tensor, rows: int, unit: int) -> Config:
    """A program has one whole tile: `rows` queries of all heads that vote together, and `unit` keys at once.

    Warps have 16 rows each, 32 on AMD. Raises ValueError where that is more than a program can hold.
    """
    rows = max(16, power_of_2(rows))
    if rows > MOST_ROWS:
        raise ValueError(f"skip: {rows} rows vote together, a program holds {MOST_ROWS}: take fewer `rows`")
    if INTERPRETED:
        return Config(rows, unit, 1, 1)
    if not gpu_of(q.device).architecture.startswith("sm_"):
        return Config(rows, unit, max(1, rows // 32), 1)
    return Config(rows, unit, 4, 2) if rows == 16 else Config(rows, unit, min(8, rows // 16), 1)


def by_key(paged: Paged | None, unit: int) -> bool:
    """Whether a tile of keys may lie in several pages, so that each key is found by itself."""
    page = page_of(paged)
    return page > 1 and block_room(page) < unit


def aligned_tiles(q: Tensor, k: Tensor, layout: Layout, rows: int, unit: int, most_keys: int) -> Tiles:
    """The tiles of all sequences, those of rows from the position on that begins the first one's tile."""
    q_origin, count, k_origin, keys = sequence_counts(q, k, layout)
    before = q_origin % rows
    sizes = (row_tiles_of(q, layout, rows), rows, -(-most_keys // unit), unit)
    return tiles_of(q_origin - before, count + before, k_origin, keys, sizes)


def count_room(q: Tensor, splits: int) -> Tensor:
    """What the splits of a step count, [B, Hq, splits, 2]: tiles kept, tiles seen."""
    return torch.empty(*q.shape[:2], splits, 2, dtype=torch.int32, device=q.device)
