"""The samples of shared memory and registers as the model sees them, and which of them it was fitted to."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path
from typing import NamedTuple, get_type_hints

from spdsl.runtime.tuning.configs import Config
from spdsl.runtime.tuning.footprint import KernelShape

FOLDER = Path(__file__).parent / "results" / "footprint"
READS = {"document": 8}  # bytes that the mask of a pattern reads for each key
GUARDED = ("big_bird", "block_sparse", "document", "longformer", "prefix_lm")  # decode skips what tensors leave out


class Sample(NamedTuple):
    """One line of a file. `links`: loads that lead to the rows of a block, a page table and a list of blocks."""

    pattern: str
    launch: str
    phase: str
    kernel: str
    dtype: str
    qk: int
    v: int
    group: int
    links: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    architecture: str
    triton: str
    shared: int

    @property
    def config(self) -> Config:
        return Config(self.block_m, self.block_n, self.num_warps, self.num_stages)

    @property
    def shape(self) -> KernelShape:
        paged = self.links > 0 and self.phase != "train"
        of_group = self.kernel.startswith("units") or self.kernel in ("decode", "select")
        group = self.group if of_group else 1
        if self.kernel == "select" and self.phase == "decode":
            group = max(16, group)  # one query: its heads are padded to the 16 rows of a tile
        return KernelShape(
            self.kernel, self.qk, self.v, 4 if self.dtype == "fp32" else 2, group, self.pattern == "alibi",
            paged, self.links > paged, READS.get(self.pattern, 0), self.pattern in GUARDED,
        )  # fmt: skip

    @property
    def held_out(self) -> bool:
        """Half of them, by the digest of everything but the result and the version."""
        return hashlib.sha256(repr(self[:14]).encode()).digest()[0] % 2 == 1


class Assembled(NamedTuple):
    """What stands behind a sample in a file of registers."""

    registers: int
    spills: int


def read(path: Path) -> list[tuple[Sample, Assembled | None]]:
    """The lines of a file."""
    kinds = list(get_type_hints(Sample).values())
    with path.open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    samples = [Sample(*(kind(text) for kind, text in zip(kinds, row, strict=False))) for row in rows]
    behind = [[int(text) for text in row[len(kinds) :]] for row in rows]
    return [(sample, Assembled(*rest) if rest else None) for sample, rest in zip(samples, behind, strict=True)]
