"""What `top_k` and `threshold` share: a Choice by score, and the parameters that shape it."""

from __future__ import annotations

import sympy

from spdsl.diagnostics import Applicability
from spdsl.ir.pattern import LEAST_BLOCK, Choice, Score
from spdsl.ir.rule import Threshold, TopK
from spdsl.ir.symbols import Boolean, K, Q, lookups
from spdsl.limits import NUMBER_VALUE
from spdsl.primitives.grains import ROWS, SHARE, UNIT, reduction
from spdsl.primitives.random import member
from spdsl.primitives.word import Grain, Kind, Parameter, Scope, SetValue

PARAMETERS = (
    Parameter("score", Kind.SCORE),
    SHARE,
    ROWS,
    UNIT,
    Parameter("force", Kind.UNITS, default=None),
    Parameter("within", Kind.UNITS, default=None),
    Parameter("least", Kind.SIZE, default=None, least=0),
    Parameter("most", Kind.SIZE, default=None, least=1),
)
PLANNED = ("across", "when")


def choose(
    scope: Scope, rule: TopK | Threshold, score: Score, share: Grain, rows: Grain, unit: Grain | None,
    force: SetValue | None, within: SetValue | None, least: int = 0, most: int | None = None,
) -> SetValue | None:  # fmt: skip
    """The set of a new Choice by `score`; None after an error."""
    grid = scope.stream(score.grain.stream).grid
    if unit is None and not grid.is_units:
        scope.refuse(
            "E105", f"a choice of overlapping entries of `{score.grain.stream}` is not built yet",
            "choose units of tokens: `unit = n`",
        )  # fmt: skip
        return None
    if any(lookups(term.test) for term in score.softmax.terms):
        scope.refuse("E105", "a score over a set that reads tensors or choices is not built yet", "")
        return None
    grains = reduction(scope, score, share, rows, unit, LEAST_BLOCK)
    forced, candidates = _units(scope, "force", force), _units(scope, "within", within)
    if grains is None or forced is None or candidates is None:
        return None
    count = rule.count.bound or 0 if isinstance(rule, TopK) else most or least
    if count * grains.unit > NUMBER_VALUE:
        scope.refuse(
            "E203", f"units of {grains.unit} tokens, so many of them, exceed any sequence", "choose fewer units"
        )
        return None
    scope.add(
        Choice(
            scope.name, rule, grains.unit, grains.rows, grains.share, least, most, score,
            grains.heads_by, grains.rows_by, grains.unit_by, force=forced, within=candidates, span=scope.span,
        )
    )  # fmt: skip
    return member(scope.name, grains.unit, grains.rows)


def ordered(scope: Scope, least: int | None, most: int | None) -> bool:
    """Whether `least` leaves room below `most`; an error if not."""
    if least is None or most is None or least <= most:
        return True
    hint = scope.instead("least", least, most, Applicability.MAYBE)
    scope.refuse("E203", f"at least {least} units cannot be at most {most}", hint)
    return False


def _units(scope: Scope, name: str, members: SetValue | None) -> Boolean | None:
    """The test over q and k of `force` (no unit if left out) or `within` (all units); None after an error."""
    if members is None:
        return sympy.false if name == "force" else sympy.true
    if [stream for stream, _ in members.parts] != [None]:
        scope.refuse("E201", f"`{name}` names units of tokens, not entries of a stream", "leave the stream out")
        return None
    ((_, test),) = members.parts
    if lookups(test) or test.free_symbols - {Q, K}:
        hint = "use sets that depend on positions alone"
        scope.refuse("E105", f"`{name}` cannot read tensors, choices, `h` or `length` yet", hint)
        return None
    return test
