"""Choices: sets of units that the caller gives, that are drawn, or that a score selects."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import lcm

import sympy

from spdsl.diagnostics import Span
from spdsl.ir.rule import Drawn, Given, Rule, Threshold, TopK, TopP
from spdsl.ir.score import Score
from spdsl.ir.symbols import Boolean, Expr

ALL_ROWS = 1 << 30  # `rows` of a choice for all queries of a call: more than any call has
LEAST_BLOCK = 16  # keys of the smallest matrix product: units and pages hold whole blocks
LEAST_TILE = 16  # queries from which on a set of tiles is read as a map; of fewer, each query has a list


@dataclass(frozen=True, slots=True)
class Choice:
    """A set that is given, drawn or selected, not computed from positions: units of `unit` keys for tiles of `rows`
    queries.

    Its test is `name(scope, q // rows, k // unit) != 0`. `rule` says which units are in the set. A given one is the
    argument `name` [B, heads, row tiles, most], unit indices padded with -1; a threshold or a part of all mass takes no
    fewer than `least` of the best that have a score, and no more than `most`. What the rule counts, its level or part
    and `least` are numbers, or expressions over `h`, `length` and lookups without positions: they are known at the
    call, for each list.

    A score is reduced over heads, then rows, then the entries of a unit, by `heads_by`, `rows_by` and `unit_by` (`sum`,
    `mean`, `max`; None where there is nothing to reduce). `sum` over entries weighs each by overlap / stride.
    From 16 rows on a list belongs to the tile and becomes a map (`tiled`); of fewer rows each query has it.
    `force` and `within` are sets of whole units as tests over the positions q and k: a unit is forced, or a candidate,
    if any of its tokens passes. Forced units count towards `count`, `least` and `most`; ties go to the lowest index.
    """

    name: str
    rule: Rule
    unit: int
    rows: int
    share: str  # head: one set per query head; group: one per kv head; all: one, of the caller
    least: Expr = sympy.S.Zero
    most: int | None = None
    score: Score | None = None
    heads_by: str | None = None
    rows_by: str | None = None
    unit_by: str | None = None
    force: Boolean = sympy.false
    within: Boolean = sympy.true
    span: Span | None = field(default=None, compare=False)

    @property
    def selected(self) -> bool:
        """Computed from a score, unless the caller passes it."""
        return self.score is not None

    @property
    def tiled(self) -> bool:
        """Whether a score selects it for tiles of queries: a list for each tile, which becomes a map."""
        return self.selected and self.rows >= LEAST_TILE

    @property
    def one_for_tile(self) -> bool:
        """Whether rows of its score choose together by tiles, each of which has one list: not by rows, nor all rows."""
        return self.tiled and self.together > 1 and not self.for_all

    @property
    def grain(self) -> int:
        """Queries of a row of the query that its score asks: more than one of a query of cells."""
        return 1 if self.score is None else self.score.softmax.rows

    @property
    def for_all(self) -> bool:
        """Whether all queries of a sequence in a call have one list."""
        return self.rows == ALL_ROWS

    @property
    def period(self) -> int:
        """Queries after which tiles repeat."""
        return 1 if self.for_all else self.rows

    @property
    def together(self) -> int:
        """Rows of its score that choose together."""
        return self.rows // self.grain

    @property
    def listed(self) -> bool:
        """Whether a call has it as a list of units for each query, which kernels walk; else as a map."""
        return not self.tiled if self.selected else self.given and self.rows == 1

    @property
    def map_argument(self) -> str:
        """What its map is called among the tensors of a call: what a score selects is there as lists, too."""
        return f"{self.name}_map" if self.selected else self.name

    @property
    def whole_unit(self) -> int:
        """Keys of whole units that blocks of keys divide: neighbouring short units are taken together."""
        return lcm(self.unit, LEAST_BLOCK)

    @property
    def gathered(self) -> bool:
        """Whether no block of keys lies in a unit, so that kernels load the keys of lists one by one."""
        return self.unit != self.whole_unit

    @property
    def given(self) -> bool:
        """Passed by the caller, always."""
        return isinstance(self.rule, Given)

    @property
    def count(self) -> int | None:
        """How many units the rule takes, where it says so: the most, where the call does."""
        return self.rule.count.bound if isinstance(self.rule, TopK | Drawn) else None

    @property
    def level(self) -> float | Expr | None:
        """The least score of a unit, where the rule has one; an expression where the call says it."""
        level = self.rule.level if isinstance(self.rule, Threshold) else None
        return float(level) if level is not None and level.is_number else level

    @property
    def part(self) -> float | Expr | None:
        """The part of all mass that the rule takes, where it goes by mass; an expression where the call says it."""
        part = self.rule.part if isinstance(self.rule, TopP) else None
        return float(part) if part is not None and part.is_number else part

    @property
    def at_call(self) -> tuple[Expr, ...]:
        """Of its numbers those that only the call knows."""
        rule = self.rule
        own: tuple[Expr, ...] = ()
        match rule:
            case TopK():
                own = (rule.count.value,)
            case TopP():
                own = (rule.part,)
            case Threshold():
                own = (rule.level,)
        return tuple(number for number in (*own, self.least) if not number.is_number)

    @property
    def capacity(self) -> int | None:
        """The most units of one list."""
        return self.count if isinstance(self.rule, TopK) else self.most

    @property
    def sized(self) -> bool:
        """Whether no score decides how many units are chosen, only which of those that have one."""
        if isinstance(self.rule, TopK):
            return not self.at_call
        return bool(self.least == self.most)
