"""Sums over the rows of a call, head by head, of what was read and what was left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spdsl.diagnosis.piece import Read
from spdsl.diagnosis.record import CRITICAL, STEPS
from spdsl.oracle.sizes import Sizes

_ROUNDING = 1e-12  # of a sum of a row's masses: nine tenths are reached by nine keys of a tenth


@dataclass(slots=True)
class Overlap:
    """How much of a row's set was in that of 1, 4, 16 rows before: sums of shares, and of how many rows, per head."""

    shares: Tensor  # float64 [steps, heads]
    rows: Tensor  # float64 [steps, heads]
    before: Tensor  # bool [heads, at most 16 rows, columns]: the last rows of the piece before

    @classmethod
    def of(cls, heads: int) -> Overlap:
        nothing = torch.zeros(len(STEPS), heads, dtype=torch.float64)
        return cls(nothing, nothing.clone(), torch.zeros(heads, 0, 0, dtype=torch.bool))

    def begin(self) -> None:
        """Another sequence: no row lies before its first."""
        self.before = self.before[:, :0]

    def add(self, sets: Tensor) -> None:
        """The next rows, bool [heads, rows, columns]; no piece has less columns than the one before."""
        kept = torch.nn.functional.pad(self.before, (0, sets.shape[2] - self.before.shape[2]))
        whole = torch.cat([kept, sets], 1)
        for i, step in enumerate(STEPS):
            first = min(max(kept.shape[1], step), whole.shape[1])
            later = whole[:, first:]
            earlier = whole[:, max(0, first - step) :][:, : later.shape[1]]
            size = later.sum(2).double()
            shared = (later & earlier).sum(2).double()
            self.shares[i] += torch.where(size > 0, shared / size.clamp(min=1), 0.0).sum(1)
            self.rows[i] += (size > 0).sum(1)
        self.before = whole[:, -STEPS[-1] :]

    def means(self, head: int) -> tuple[float | None, ...]:
        """None where no row has one so many steps before."""
        pairs = zip(self.shares[:, head].tolist(), self.rows[:, head].tolist(), strict=True)
        return tuple(share / rows if rows else None for share, rows in pairs)


@dataclass(slots=True)
class Sums:
    """Of one branch, per query head."""

    heads: int
    rows: int = 0
    kept: Tensor = field(init=False)
    missed: Tensor = field(init=False)
    missed_by_group: Tensor = field(init=False)
    read: Tensor = field(init=False)
    together: Tensor = field(init=False)
    possible: Tensor = field(init=False)
    wrong: Tensor = field(init=False)
    dense: Tensor = field(init=False)
    overlap: Overlap = field(init=False)

    def __post_init__(self) -> None:
        for name in ("kept", "missed", "missed_by_group", "read", "together", "possible", "wrong", "dense"):
            setattr(self, name, torch.zeros(self.heads, dtype=torch.float64))
        self.overlap = Overlap.of(self.heads)

    def add(self, found: Read) -> None:
        """A piece of one sequence."""
        mass, read = found.mass[0], found.read[0]
        group = union(read, found.group)
        self.rows += mass.shape[1]
        self.kept += torch.where(read, mass, 0.0).sum((1, 2))
        for into, shares in zip((self.missed, self.missed_by_group), missed(mass, (read, group)), strict=True):
            into += shares.sum(1)
        self.read += read.sum((1, 2))
        self.together += group.sum((1, 2))
        self.possible += found.open.sum()
        self.wrong += (found.out - found.dense)[0].square().sum((1, 2))
        self.dense += found.dense[0].square().sum((1, 2))
        self.overlap.add(read)


def union(read: Tensor, group: int) -> Tensor:
    """What any head of its group reads, for each head: bool [heads, rows, keys]."""
    return read.view(-1, group, *read.shape[1:]).any(1).repeat_interleave(group, 0)


def missed(mass: Tensor, sets: Sequence[Tensor]) -> list[Tensor]:
    """The share of the fewest keys that hold CRITICAL of a row's mass that is not read, of each of some `sets`.

    mass and sets [heads, rows, keys] -> float64 [heads, rows]. Of equal keys the first ones count.
    """
    falling = mass.sort(dim=-1, descending=True, stable=True)
    before = falling.values.cumsum(-1) - falling.values
    critical = (before < CRITICAL - _ROUNDING) & (falling.values > 0)
    number = critical.sum(-1).clamp(min=1)
    return [(critical & ~read.gather(-1, falling.indices)).sum(-1).double() / number for read in sets]


@dataclass(slots=True)
class Lost:
    """Where the dense mass lies that is not read: tiles of queries and keys, a mean over heads."""

    step: int
    sums: Tensor  # float64 [tiles, tiles]

    @classmethod
    def of(cls, tokens: int, side: int) -> Lost:
        step = -(-tokens // side)
        tiles = -(-tokens // step)
        return cls(step, torch.zeros(tiles, tiles, dtype=torch.float64))

    def add(self, found: Read, first: int) -> None:
        """Rows from position `first` on."""
        lost = torch.where(found.read[0], 0.0, found.mass[0]).mean(0)
        lost = torch.nn.functional.pad(lost, (0, -lost.shape[1] % self.step))
        by_key = lost.view(len(lost), -1, self.step).sum(2)
        rows = (first + torch.arange(len(lost))) // self.step
        self.sums[:, : by_key.shape[1]].index_add_(0, rows, by_key)

    def rows_of(self, sizes: Sizes) -> Tensor:
        """How many queries of a sequence lie in each row of tiles: [tiles, 1]."""
        at = (sizes.q_origin + torch.arange(sizes.rows)) // self.step
        return torch.bincount(at, minlength=len(self.sums)).unsqueeze(1)
