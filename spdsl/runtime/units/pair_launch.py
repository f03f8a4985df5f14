"""Launching the kernels over pairs: which heads at once, their lists, and room for the parts of their results."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from spdsl.runtime.language import tl, triton
from spdsl.runtime.launch.launch import INTERPRETED, Paged, launch, strided, wide
from spdsl.runtime.sequences import Layout
from spdsl.runtime.tiles.kernel import Call, Const
from spdsl.runtime.tuning.unit_configs import PARTS_BYTES, PARTS_BYTES_INTERPRETED, UnitShape, rows_alone
from spdsl.runtime.units.packed import UnitConst
from spdsl.runtime.units.pairs import PairLists, add_pairs, merge_pairs
from spdsl.runtime.units.unit_launch import unit_config
from spdsl.runtime.units.units import UnitJobs, unit_jobs, unit_tiles


def turns(chosen: Tensor, dim: int, q: Tensor) -> Iterator[slice]:
    """The list heads of `chosen` [B, H, N, n], as many at a time as have room for parts of `dim` numbers and an lse."""
    batch, heads, rows, most = chosen.shape
    size = batch * rows * most * (dim + 1) * wide(q.dtype).itemsize
    many = max(1, (PARTS_BYTES_INTERPRETED if INTERPRETED else PARTS_BYTES) // max(1, size))
    return (slice(first, min(first + many, heads)) for first in range(0, heads, many))


def pair_lists(
    chosen: Tensor, first: int, groups: int, unit: int, layout: Layout, longest: int
) -> tuple[PairLists, UnitJobs]:
    """Lists [B, H, N, n] of the query heads from `first` on -> their pairs by unit, heads in `groups` equal groups."""
    tiles = unit_tiles(chosen, 1, unit, layout)
    jobs = unit_jobs(tiles, unit, groups, chosen.shape[0], layout, longest)
    heads = first + torch.arange(groups, device=chosen.device, dtype=torch.int32) * (chosen.shape[1] // groups)
    entries, most = jobs.places.shape[1], jobs.sequence.shape[1]
    lists = PairLists(
        jobs.places.int(), *jobs[1:-1], tiles.counts, tiles.first, heads, entries, most, tiles.tiles, tiles.width
    )
    return lists, jobs


def pair_shape(kernel: str, q: Tensor, v_dim: int, unit: int, paged: Paged | None = None) -> UnitShape:
    """Tiles of pairs for `units`, `units_dq` or `units_dkdv`."""
    return rows_alone(unit_config(f"{kernel}_pairs", q, v_dim, 1, unit, paged), unit)


def pair_constants(unit: int, lists_per_head: int) -> UnitConst:
    """Each row is a tile of its own, of one query."""
    return UnitConst(*(tl.constexpr(value) for value in (unit, 1, lists_per_head, False, 1, 1)))


def parts_of(lists: PairLists, dim: int, q: Tensor) -> Tensor:
    """Room for a result of `dim` numbers of each pair: [1, H, pairs, dim]."""
    return torch.empty(1, len(lists.pairs), lists.entries, dim, device=q.device, dtype=wide(q.dtype))


def merge_parts(
    partial: Tensor, partial_lse: Tensor, out: Tensor, lse: Tensor, sink: Tensor | None, call: Call, lists: PairLists,
    longest: int, sequences: int, C: Const, shape: UnitShape
) -> None:  # fmt: skip
    """The outputs of the heads of `lists`, from their parts."""
    launch(
        merge_pairs, (triton.cdiv(longest, shape.config.block_m), len(lists.pairs), sequences),
        strided(partial), strided(partial_lse), strided(out, sequences), strided(lse, sequences), sink, call, lists, C,
        num_warps=shape.config.num_warps, num_stages=1,
    )  # fmt: skip


def add_rows(
    partial: Tensor, dq: Tensor, call: Call, lists: PairLists, longest: int, sequences: int, C: Const, shape: UnitShape
) -> None:
    """dQ of the heads of `lists`, from its parts."""
    launch(
        add_pairs, (triton.cdiv(longest, shape.config.block_m), len(lists.pairs), sequences),
        strided(partial), strided(dq, sequences), call, lists, C,
        num_warps=shape.config.num_warps, num_stages=1,
    )  # fmt: skip
