"""Launching the kernels over units: tiles, lists and constants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spdsl.runtime.language import tl
from spdsl.runtime.launch.launch import INTERPRETED, Paged, config_for, constants, launch, strided, wide
from spdsl.runtime.launch.splits import split_count
from spdsl.runtime.select.ranking import SelectConst, merge_ranks
from spdsl.runtime.sequences import Layout
from spdsl.runtime.tiles.combine import Splits
from spdsl.runtime.tiles.kernel import Call, Const, Source
from spdsl.runtime.tuning.configs import Config
from spdsl.runtime.tuning.footprint import KernelShape
from spdsl.runtime.tuning.gpu import gpu_of
from spdsl.runtime.tuning.unit_configs import (
    KEYS_PER_UNIT,
    UNIT_TABLES,
    UnitShape,
    fitted,
    job_tiles,
    mask_words,
    most_keys,
    one_query,
    page_of_block,
    table_row,
    tile_of_lists,
)
from spdsl.runtime.tuning.warps import without_repeats
from spdsl.runtime.units.packed import Inverse, StepLists, StepLse, UnitConst, UnitLists, add_slots
from spdsl.runtime.units.units import UnitJobs, UnitTiles, unit_jobs, unit_tiles


def unit_shape(kernel: str, q: Tensor, v_dim: int, lists: int, unit: int, paged: Paged | None = None) -> UnitShape:
    """Tiles of `lists` list heads for `units`, `units_dq`, `units_dkdv`, `units_decode` or `select`."""
    group = q.shape[1] // lists
    return fitted(unit_config(kernel, q, v_dim, group, unit, paged), group, unit)


def unit_config(kernel: str, q: Tensor, v_dim: int, group: int, unit: int, paged: Paged | None = None) -> Config:
    row = table_row(kernel, unit)
    paged = None if paged is None else paged._replace(page=page_of_block(paged.page, unit))
    return config_for(row, q, v_dim, paged, group=group, most_n=most_keys(unit), tables=UNIT_TABLES)


def select_step(shape: UnitShape, q: Tensor) -> UnitShape:
    """The shape of `select` for one query of each sequence."""
    return with_work(one_query(shape), q)


def select_tile(shape: UnitShape, rows: int, q: Tensor) -> UnitShape:
    """The shape of `select` for lists that `rows` queries have together."""
    return with_work(tile_of_lists(shape, rows), q) if rows > 1 else shape


def with_work(shape: UnitShape, q: Tensor) -> UnitShape:
    """A shape of `select` whose few rows may have no work for every warp."""
    kernel = KernelShape("select", q.shape[3], 16, q.element_size(), shape.group)
    config = shape.config if INTERPRETED else without_repeats(kernel, shape.config, gpu_of(q.device).architecture)
    return shape._replace(config=config)


def unit_lists(chosen: Tensor, shape: UnitShape, unit: int, layout: Layout) -> UnitTiles:
    return unit_tiles(chosen, shape.lanes, unit, layout)


def lists_of(tiles: UnitTiles) -> UnitLists:
    """The lists for a kernel."""
    return UnitLists(tiles.units, tiles.masks, tiles.counts, tiles.first, tiles.tiles, tiles.width)


def step_lists(chosen: Tensor) -> StepLists:
    """Lists [S, H, 1, n], ascending with -1 at the end, for a kernel with one query per sequence."""
    return StepLists(chosen.int().contiguous(), chosen.shape[3])


def unit_constants(shape: UnitShape, unit: int, lists_per_head: int = 1, per: int = 1) -> UnitConst:
    values = (unit, shape.lanes, lists_per_head, True, per, mask_words(per, shape.lanes))
    return UnitConst(*(tl.constexpr(value) for value in values))


def packed_constants(q: Tensor, v_dim: int, scale: Any, shape: UnitShape, splits: int = 1, page: int = 0) -> Const:
    return constants(q, v_dim, scale, shape.config, shape.group, splits, page, shape.gathered)


def inverse_of(tiles: UnitTiles, jobs: UnitJobs) -> Inverse:
    """The inverse lists for a kernel."""
    numbers, words = (jobs.places // tiles.width).int(), tiles.masks.numel() // max(1, tiles.units.numel())
    masks = tiles.masks.view(len(jobs.places), -1, words)
    masks = masks.gather(1, jobs.places[..., None].expand(-1, -1, words))
    entries, most = jobs.places.shape[1], jobs.sequence.shape[1]
    return Inverse(numbers, masks, *jobs[1:-1], tiles.first, entries, most, tiles.tiles)


def unit_inverse(tiles: UnitTiles, unit: int, k: Tensor, layout: Layout) -> UnitJobs:
    return unit_jobs(tiles, unit, k.shape[1], k.shape[0], layout, job_tiles(unit, INTERPRETED))


def slot_buffer(jobs: UnitJobs, k: Tensor, v: Tensor, unit: int) -> Tensor:
    """Room for the parts of dK and dV of units with several jobs: [1, Hk, slots, unit * (Dqk + Dv)]."""
    size = unit * (k.shape[3] + v.shape[3])
    return torch.empty(1, k.shape[1], max(1, jobs.slots), size, device=k.device, dtype=wide(k.dtype))


def add_parts(
    buffer: Tensor, dk: Tensor, dv: Tensor, keys: Source, call: Call, jobs: UnitJobs,
    inverse: tuple[Any, ...], U: UnitConst, C: Const, sequences: int, blocks: int, config: Config
) -> None:  # fmt: skip
    """Adds the parts of units with several jobs, in their order; `inverse` are the jobs for a kernel."""
    if jobs.slots:
        launch(
            add_slots, (jobs.sequence.shape[1], dk.shape[1], blocks),
            strided(buffer), strided(dk, sequences), strided(dv, sequences), keys, call, inverse, U, C,
            num_warps=config.num_warps, num_stages=1,
        )  # fmt: skip


def step_lse(lse: Splits | Tensor | None) -> StepLse:
    """For `select`, of a step whose splits nobody has merged; else nothing in it."""
    if not isinstance(lse, Splits):
        return StepLse(None, None, None)
    return StepLse(strided(lse.lse), lse.sink, lse.lse.shape[2])


def select_constants(
    shape: UnitShape, unit: int, most: int, least: int, stride: int, first: int, entries: int, splits: int,
    part: float = 0.0, below: bool = False,
) -> SelectConst:  # fmt: skip
    """`most` units of a list, `least` of them at any score; `entries` overlap a unit, from its entry `first` on.

    `stride` is that of the entry grid; `part` of all mass is taken, where lists go by mass (1: the call says it).
    """
    kept = ranks_kept(most)
    ranks = max(shape.config.block_n, kept, 16)
    values = (
        unit,
        shape.lanes,
        ranks,
        kept,
        kept.bit_length() - 1,
        most,
        least,
        unit // stride,
        first,
        entries,
        splits,
        ranks_room(most, part > 0),
        part,
        below,
    )
    return SelectConst(*(tl.constexpr(value) for value in values))


def ranks_kept(most: int) -> int:
    return 1 << max(1, (most - 1).bit_length())


def ranks_room(most: int, of_mass: bool) -> int:
    """Numbers that a split leaves of a list: its ranks, and its mass where lists go by mass."""
    return ranks_kept(most) + of_mass


def select_splits(queries: int, lists: int, units: int, device: torch.device) -> int:
    """Programs that share the units of one query, where every sequence has one."""
    if INTERPRETED:
        return max(1, min(3, units))
    return split_count(queries * lists, KEYS_PER_UNIT * units, gpu_of(device).processors)


def merge_splits(ranks: Tensor, chosen: Tensor, S: SelectConst, limits: Tensor | None = None) -> None:
    grid = (chosen.shape[0], chosen.shape[1])
    launch(merge_ranks, grid, ranks, strided(chosen), S, limits, num_warps=1, num_stages=1)
