"""The numbers of a diagnosis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

CRITICAL = 0.9  # of the dense mass of a query: the fewest keys that hold it are its critical ones
STEPS = (1, 4, 16)  # queries between two sets whose overlap is told

Shares = tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Head:
    """One query head of one layer, means over its queries.

    kept: dense mass on the keys that it reads. missed: of its critical keys those that it does not read;
    missed_by_group: those that no head of its group reads. error: |out - dense| / |dense|. sparsity: 1 - keys read /
    keys of dense attention. union: keys that its group reads / keys that it reads; None if it reads none. overlap: of
    the keys read, those that the queries 1, 4 and 16 before read, too.
    """

    layer: int
    head: int
    branch: str | None  # a softmax of a pattern with several; None: the whole result
    kept: float
    missed: float
    missed_by_group: float
    error: float
    sparsity: float
    union: float | None
    overlap: Shares


@dataclass(frozen=True, slots=True)
class Chosen:
    """A list of a choice: how many units it has in the mean, and the overlap of 1, 4 and 16 queries, in units."""

    layer: int
    choice: str
    head: int  # number of the list
    units: float
    overlap: Shares


@dataclass(frozen=True, slots=True)
class Diagnosis:
    pattern: str
    params: dict[str, str]
    phase: str
    queries: int
    keys: int
    heads: tuple[Head, ...]
    choices: tuple[Chosen, ...]
    notes: tuple[str, ...]
    lost: Tensor
    """Dense mass that a query of a tile does not read in it, a mean over heads and layers, float64 [tiles, tiles]."""
    step: int
    """Tokens of the side of such a tile."""

    @property
    def layers(self) -> list[int]:
        return sorted({one.layer for one in self.heads})

    @property
    def whole(self) -> list[Head]:
        """The heads of the whole result."""
        return [one for one in self.heads if one.branch is None]

    def to_json(self) -> dict[str, Any]:
        return {
            "pattern": self.pattern, "params": self.params, "phase": self.phase, "queries": self.queries,
            "keys": self.keys, "critical": CRITICAL, "steps": list(STEPS), "notes": list(self.notes),
            "mean": mean(self.whole), "heads": [asdict(one) for one in self.heads],
            "choices": [asdict(one) for one in self.choices],
        }  # fmt: skip


FIELDS = ("kept", "missed", "missed_by_group", "error", "sparsity", "union")


def mean(heads: Sequence[Head]) -> dict[str, Any]:
    """Means over heads of each number, of those that have it."""
    found: dict[str, Any] = {name: _mean([getattr(one, name) for one in heads]) for name in FIELDS}
    found["overlap"] = [_mean([one.overlap[i] for one in heads]) for i in range(len(STEPS))]
    return found


def _mean(values: list[float | None]) -> float | None:
    known = [x for x in values if x is not None]
    return sum(known) / len(known) if known else None
