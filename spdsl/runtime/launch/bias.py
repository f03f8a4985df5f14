"""The gradient of a tensor that a bias reads: what the programs of a kernel leave, and how torch adds it up.

Each program has sums of its own, and says which elements of the tensor they belong to; torch adds them in one order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

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


class BiasGradient:
    """The gradient of x [B or 1, axes] while its parts are added."""

    def __init__(self, x: Tensor) -> None:
        self._like = x
        self._exact = wide(x.dtype)  # of sums
        self._owned: Tensor | None = None
        self._numbered: Tensor | None = None  # by number; what belongs nowhere is in front

    @cached_property
    def numbers(self) -> Tensor:
        """The number of each element, from 1 on: read in place of x, it tells which element was read, 0: none."""
        count, x = self._like.numel(), self._like
        kind = torch.int32 if count < 2**31 - 1 else torch.int64
        return torch.arange(1, count + 1, dtype=kind, device=x.device).view(x.shape)

    @property
    def elements(self) -> Tensor:
        """The gradient itself, for programs that own elements."""
        if self._owned is None:
            self._owned = self._like.new_zeros(self._like.shape, dtype=self._exact)
        return self._owned

    def add(self, sums: Tensor, places: Tensor) -> None:
        """Sums, each for the element of that number. The order of the sums decides that of the addition."""
        if self._numbered is None:
            self._numbered = self._like.new_zeros(self._like.numel() + 1, dtype=self._exact)
        sums, places = sums.flatten().to(self._exact), places.flatten().long()
        self._numbered.index_put_((places,), sums, accumulate=True)

    def add_tables(self, sums: Tensor, places: Tensor, axes: Sequence[int]) -> None:
        """Tables [.., heads * entries] over these axes of x, which begin at the elements `places` [.., heads]."""
        x, offsets = self.numbers, torch.zeros(1, dtype=torch.int64, device=self._like.device)
        for axis in axes:
            steps = torch.arange(x.shape[axis], device=x.device) * x.stride(axis)
            offsets = (offsets[:, None] + steps).flatten()
        places = places.view(*sums.shape[:-1], -1, 1).long()
        self.add(sums, torch.where(places > 0, places + offsets, 0))

    @property
    def total(self) -> Tensor:
        """Of all parts."""
        if self._numbered is None:
            return self.elements.to(self._like.dtype)
        found = self._numbered[1:].view(self._like.shape)
        found = found.clone() if self._owned is None else found + self._owned
        return found.to(self._like.dtype)


def bias_config(q: Tensor, v_dim: int, listed: bool, by: str) -> Config:
    """The tiles of dQ, or, for sums `by` "key", of dK and dV: fewer keys where each pair has a place, and no more warps
    than its products have work for. They are the last of a step, so a row of scores stays with one warp.
    """
    narrow = q.element_size() < 4  # wider numbers need more warps for their registers, whatever these repeat
    most = PLACED_KEYS if narrow and by in ("table", "pair") else 0
    found = config_for("dkdv_bias" if by == "key" else "dq_bias", q, v_dim, listed=listed, most_n=most)
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
