"""What the GPU does: for each softmax the sweeps over its streams, and how each visits its keys (`ir/visit.py`).

Templates know sweeps, masks and softmax; they know no word of the language.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import sympy

from spdsl.ir.bias import BiasRead, Place
from spdsl.ir.pattern import Choice, Pattern, Softmax, Stream, Tensor
from spdsl.ir.symbols import Boolean
from spdsl.ir.visit import CHOSEN, PACKED, TILE, Order, Range, Rows, TileMap, Units, Visit


@dataclass(frozen=True, slots=True)
class Sweep:
    """One stream of a softmax.

    `decode` are the ranges of a single query for any head, with elements masked one by one; none over units.
    """

    stream: Stream
    test: Boolean
    visit: Visit
    decode: tuple[Range, ...]
    line: int  # of the source


class Role(Enum):
    """What a softmax is computed for."""

    BRANCH = "branch"  # output and log-sum-exp
    LSE = "lse"  # the log-sum-exp alone, for the probabilities of a score
    LOGITS = "logits"  # nothing: a score recomputes its logits


@dataclass(frozen=True, slots=True)
class SoftmaxPlan:
    """One normaliser and its sweeps; `reads` are the tensors and choices that its tests and bias look up.

    All its streams lie on one grid. Units of a choice are visited by one sweep alone.
    """

    softmax: Softmax
    sweeps: tuple[Sweep, ...]
    reads: tuple[Tensor | Choice, ...]
    role: Role = Role.BRANCH
    wanted: Boolean = sympy.true
    """On `length`: where it is false another result answers, and nobody reads this one."""
    step: int = 1
    of_class: SoftmaxPlan | None = None
    """With step > 1: the plan over one residue class of the tokens, for calls that hold whole sequences."""
    bias_reads: tuple[BiasRead, ...] = ()
    """What of its bias gets a gradient from its result."""

    @property
    def name(self) -> str:
        return self.softmax.name

    @property
    def units(self) -> Choice | None:
        """The choice whose units it visits."""
        visit = self.sweeps[0].visit
        return visit.choice if isinstance(visit, Units) else None

    @property
    def pairs(self) -> bool:
        """Whether each unit meets the queries that chose it."""
        visit = self.sweeps[0].visit
        return isinstance(visit, Units) and visit.order is Order.KEYS

    @property
    def learned_reads(self) -> tuple[BiasRead, ...]:
        """Those that have kernels, of tensors all of whose reads have."""
        summed = _SUMMED[0 if self.units is None else 1 + self.pairs]
        without = {read.tensor for read in self.bias_reads if read.place not in summed}
        return tuple(read for read in self.bias_reads if read.tensor not in without)

    @property
    def maps(self) -> tuple[Sweep, ...]:
        """The sweeps whose tiles are listed."""
        return tuple(sweep for sweep in self.sweeps if isinstance(sweep.visit, TileMap))

    @property
    def by_pair(self) -> bool:
        """Whether its kernels load numbers of the caller for each pair."""
        return any(isinstance(read, Tensor) and read.by_pair for read in self.reads)

    @property
    def rows(self) -> Rows:
        """Of a program for many queries; for one query they are the heads of a group or a list."""
        return TILE if self.units is None else CHOSEN if self.pairs else PACKED


# What a program can add up: over tiles of neighbouring rows, over packed rows, over pairs of a query and a unit.
_SUMMED = (
    frozenset(Place) - {Place.OTHER},
    frozenset({Place.HEAD, Place.ROW, Place.TABLE, Place.PAIR}),
    frozenset({Place.HEAD, Place.TABLE}),
)


@dataclass(frozen=True, slots=True)
class ChoicePlan:
    """How a selected choice is computed: `forced` and `allowed` over q, the number of a row of the score, and the first
    and last key of a unit.

    `weights[i]` is what entry `first + i` of a unit adds to its score, counted in entries from the unit's own first.
    """

    choice: Choice
    forced: Boolean
    allowed: Boolean
    first: int
    weights: tuple[float, ...]
    ratio: int  # entries from one unit to the next
    reads: tuple[Tensor | Choice, ...]  # of the score's softmax
    at_call: tuple[Tensor | Choice, ...] = ()  # of its numbers
    asked: tuple[Tensor | Choice, ...] = ()  # of `force` and `within`, where these are asked token by token
    sets: bool = False  # whether they are: `forced` and `allowed` then say nothing of them

    @property
    def read(self) -> tuple[Tensor | Choice, ...]:
        """All that it reads."""
        return tuple(dict.fromkeys((*self.reads, *self.at_call, *self.asked)))

    @property
    def shared(self) -> int:
        """Entries of a unit that the unit before it overlaps, too: they were multiplied there."""
        return max(0, len(self.weights) - self.ratio)

    @property
    def reach(self) -> int:
        """Units behind the first one of an entry that it overlaps at most."""
        return (len(self.weights) - 1) // self.ratio

    @property
    def ahead(self) -> int:
        """The first entry that the unit before does not have, but the unit behind does."""
        return max(self.shared, self.ratio)

    def weights_of(self, reach: int) -> dict[int, float]:
        """What the entries that a unit is first to overlap add to the unit `reach` units behind it."""
        back = reach * self.ratio
        return {i: self.weights[i - back] for i in range(max(self.shared, back), len(self.weights))}


@dataclass(frozen=True, slots=True)
class Joint:
    """Softmaxes over disjoint keys that are read as their exact merge alone: one operator in training.

    With the merged output and log-sum-exp the backward of each part is its share of the gradient: nothing is merged
    there.
    """

    name: str
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    pattern: Pattern
    softmaxes: tuple[SoftmaxPlan, ...]
    choices: tuple[ChoicePlan, ...] = ()
    joints: tuple[Joint, ...] = ()
