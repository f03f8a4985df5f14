"""What the GPU does: for each softmax the sweeps over its streams, each in one loop form.

A kernel is rows x visit. Rows: a tile of queries of one head (train, prefill), or one query with the heads of a group
(decode). Visit: a range whose ends the kernel computes, or a list of blocks built on the device. Templates know sweeps,
masks and softmax; they know no word of the language.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import sympy

from spdsl.ir.pattern import Choice, Pattern, Softmax, Stream, Tensor
from spdsl.ir.symbols import Boolean, Expr


class Form(Enum):
    """How a sweep finds its blocks."""

    RANGES = "ranges"  # bounds computed in the kernel from the corners of the tile
    LISTS = "lists"  # full and partial blocks, listed on the device before the launch
    UNITS = "units"  # the units that a choice names for each query; a tile visits the union of its queries
    PAIRS = "pairs"  # the same, keys outermost: a unit meets the queries that chose it, and parts of outputs are merged


@dataclass(frozen=True, slots=True)
class Range:
    """Visit [first, end) if `condition`; if `full`, every pair of the tile is visible in [full_first, full_end)."""

    first: Expr
    end: Expr
    condition: Boolean
    full_first: Expr
    full_end: Expr
    full: Boolean


@dataclass(frozen=True, slots=True)
class Sweep:
    """One stream of a softmax.

    `keys` and `rows` (the transpose, for dK and dV) come in an order in which a running cursor visits no block twice;
    they are empty in the list form, where `may` and `must` sort the tiles into empty, partial and full.
    `decode` are the ranges of a single query for any head, with elements masked one by one.
    """

    stream: Stream
    test: Boolean
    form: Form
    keys: tuple[Range, ...]
    rows: tuple[Range, ...]
    decode: tuple[Range, ...]
    may: Boolean
    must: Boolean
    line: int  # of the source


class Role(Enum):
    """What a softmax is computed for."""

    BRANCH = "branch"  # output and log-sum-exp
    LSE = "lse"  # the log-sum-exp alone, for the probabilities of a score
    LOGITS = "logits"  # nothing: a score recomputes its logits


@dataclass(frozen=True, slots=True)
class SoftmaxPlan:
    """One normaliser and its sweeps; `reads` are the tensors and choices that its tests and bias look up.

    All its streams lie on one grid. In the forms UNITS and PAIRS there is one sweep, over the choice `units`.
    """

    softmax: Softmax
    sweeps: tuple[Sweep, ...]
    reads: tuple[Tensor | Choice, ...]
    role: Role = Role.BRANCH
    units: Choice | None = None
    wanted: Boolean = sympy.true
    """On `length`: where it is false another result answers, and nobody reads this one."""
    step: int = 1
    of_class: SoftmaxPlan | None = None
    """With step > 1: the plan over one residue class of the tokens, for calls that hold whole sequences."""

    @property
    def name(self) -> str:
        return self.softmax.name

    @property
    def pairs(self) -> bool:
        """Whether each unit meets the queries that chose it."""
        return self.sweeps[0].form is Form.PAIRS


@dataclass(frozen=True, slots=True)
class ChoicePlan:
    """How a selected choice is computed: `forced` and `allowed` over q and the first and last key of a unit.

    `weights[i]` is what entry `first + i` of a unit adds to its score, counted in entries from the unit's own first.
    """

    choice: Choice
    forced: Boolean
    allowed: Boolean
    first: int
    weights: tuple[float, ...]
    ratio: int  # entries from one unit to the next
    reads: tuple[Tensor | Choice, ...]  # of the score's softmax

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
