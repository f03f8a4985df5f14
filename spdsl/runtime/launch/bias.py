"""Launching the kernels of the gradients of biases: their tiles, and room for what each program leaves."""

from __future__ import annotations

import torch
from torch import Tensor

from spdsl.runtime.language import tl, triton
from spdsl.runtime.launch.launch import INTERPRETED, config_for, wide
from spdsl.runtime.tiles.bias import Table
from spdsl.runtime.tuning.configs import Config
from spdsl.runtime.tuning.gpu import gpu_of

PLACED_KEYS = 32  # of a block: entries and pointers take registers, too
DISTANCES_AT_ONCE, DISTANCES_INTERPRETED = 64, 16
TABLE_CHUNK = 128  # entries that a program keeps in registers
TABLE_CHUNK_INTERPRETED = 16  # so that small tables have several parts


def bias_config(row: str, q: Tensor, v_dim: int, listed: bool, by: str) -> Config:
    """The tiles of dQ, or, for sums `by` "key", of dK and dV: fewer keys where each pair has a place, and no more warps
    than its products have work for. They are the last of a step, so a row of scores stays with one warp.

    row: of the tables, behind the name of the kernel.
    """
    narrow = q.element_size() < 4  # wider numbers need more warps for their registers, whatever these repeat
    most = PLACED_KEYS if narrow and by in ("table", "pair") else 0
    found = config_for(("dkdv" if by == "key" else "dq") + row, q, v_dim, listed=listed, most_n=most)
    rows = found.block_n if by == "key" else found.block_m
    own = 16 if gpu_of(q.device).architecture.startswith("sm_") else 32  # rows of a warp
    while narrow and found.num_warps > 1 and own * found.num_warps > rows:
        found = found._replace(num_warps=found.num_warps // 2)
    return found


def table_of(entries: int, heads: int, config: Config | None = None) -> Table:
    """For kernels that sum a table of so many entries for each of the heads of a program, in tiles of `config`."""
    total = entries * heads
    most = TABLE_CHUNK_INTERPRETED if INTERPRETED else TABLE_CHUNK
    chunk = min(most, max(16, triton.next_power_of_2(total)))
    distances = 0 if config is None else int(triton.next_power_of_2(config.block_m + config.block_n))
    step = DISTANCES_INTERPRETED if INTERPRETED else DISTANCES_AT_ONCE
    values = (entries, total, chunk, -(-total // chunk), distances, min(distances, step))
    return Table(*(tl.constexpr(value) for value in values))


def chunks_of(table: Table) -> int:
    return int(table.CHUNKS.value)


def program_sums(q: Tensor, programs: tuple[int, int, int], entries: int = 0, heads: int = 1) -> tuple[Tensor, Tensor]:
    """Zeros for one sum of each program, or a table for each of its heads; and for the places, 0: nowhere."""
    sums = (*programs, entries * heads) if entries else programs
    places = (*programs, heads) if heads > 1 else programs
    return q.new_zeros(sums, dtype=wide(q.dtype)), q.new_zeros(places, dtype=torch.int64)


def row_sums(q: Tensor) -> tuple[Tensor, Tensor]:
    """The same for each row of each head."""
    return q.new_zeros(q.shape[:3], dtype=wide(q.dtype)), q.new_zeros(q.shape[:3], dtype=torch.int64)


def key_sums(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The same for each key of each query head."""
    shape = (k.shape[0], q.shape[1], k.shape[2])
    return q.new_zeros(shape, dtype=wide(q.dtype)), q.new_zeros(shape, dtype=torch.int64)


def sharing(q: Tensor, x: Tensor, heads: int, by_head: bool) -> tuple[int, int]:
    """How many of the heads, and sequences, read the same elements of x at [q][k]: one program adds for all of them."""
    apart = x.shape[0] > 1 or q.shape[0] == 1  # packed sequences have rows of their own
    return 1 if by_head else heads, 1 if apart else q.shape[0]
