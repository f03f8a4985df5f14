"""Launching kernels that skip tiles. What a tile is belongs to the meaning, so no tuning changes its sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from spdsl.runtime.call.lists import Tiles, sequence_counts, tiles_of
from spdsl.runtime.language import tl
from spdsl.runtime.launch.launch import INTERPRETED, Paged, page_of
from spdsl.runtime.sequences import Layout
from spdsl.runtime.skip.notes import row_tiles_of
from spdsl.runtime.skip.skip_kernels import SkipTile
from spdsl.runtime.tuning.configs import Config, block_room, power_of_2
from spdsl.runtime.tuning.gpu import gpu_of

_FEW_REGISTERS = ("sm_80", "sm_86", "sm_89", "sm_120")  # operands of products lie in registers
MOST_ROWS = 256  # of a program: heads that vote together are rows of one tile


def skip_config(q: Tensor, rows: int, unit: int) -> Config:
    """A program has one whole tile: `rows` queries of all heads that vote together, and `unit` keys at once.

    Warps have 16 rows each, 32 on AMD. Raises ValueError where that is more than a program can hold.
    """
    rows = max(16, power_of_2(rows))
    if rows > MOST_ROWS:
        raise ValueError(f"skip: {rows} rows vote together, a program holds {MOST_ROWS}: take fewer `rows`")
    if INTERPRETED:
        return Config(rows, max(16, unit // 2), 1, 1)
    architecture = gpu_of(q.device).architecture
    if not architecture.startswith("sm_"):
        return Config(rows, unit, max(1, rows // 32), 1)
    if rows == 16:
        return Config(rows, unit, 4, 2)
    if rows >= 128 and unit >= 128 and architecture in _FEW_REGISTERS:
        return Config(rows, unit // 2, 8, 2)
    return Config(rows, unit, min(8, rows // 16), 1)


def skip_tile(unit: int, config: Config) -> SkipTile:
    """How a tile of `unit` keys is loaded."""
    return SkipTile(tl.constexpr(unit), tl.constexpr(unit // config.block_n))


def by_key(paged: Paged | None, block: int) -> bool:
    """Whether a block of keys may lie in several pages, so that each key is found by itself."""
    page = page_of(paged)
    return page > 1 and block_room(page) < block


def aligned_tiles(q: Tensor, k: Tensor, layout: Layout, rows: int, unit: int, most_keys: int) -> Tiles:
    """The tiles of all sequences, those of rows from the position on that begins the first one's tile."""
    q_origin, count, k_origin, keys = sequence_counts(q, k, layout)
    before = q_origin % rows
    sizes = (row_tiles_of(q, layout, rows), rows, -(-most_keys // unit), unit)
    return tiles_of(q_origin - before, count + before, k_origin, keys, sizes)


def count_room(q: Tensor, splits: int) -> Tensor:
    """What the splits of a step count, [B, Hq, splits, 2]: tiles kept, tiles seen."""
    return torch.empty(*q.shape[:2], splits, 2, dtype=torch.int32, device=q.device)
