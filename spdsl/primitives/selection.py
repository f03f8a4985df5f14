"""What `top_k`, `top_p` and `threshold` share: a Choice by score, and the parameters that shape it."""

from __future__ import annotations

import sympy
from sympy.core.function import AppliedUndef

from spdsl.diagnostics import Applicability
from spdsl.ir.choice import ALL_ROWS, LEAST_TILE
from spdsl.ir.pattern import Choice, Score, Tensor, in_memory, softmaxes_of
from spdsl.ir.rule import Threshold, TopK, TopP
from spdsl.ir.symbols import Boolean, Expr, K, Q, lookup_name, lookups
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
    Parameter("least", Kind.COUNT, default=None, least=0),
    Parameter("most", Kind.SIZE, default=None, least=1),
)
PLANNED = ("across", "when")
APART = ("head", "group")  # an axis, and whose lists have no number along it


def choose(
    scope: Scope, rule: TopK | TopP | Threshold, score: Score, share: Grain, rows: Grain, unit: Grain | None,
    force: SetValue | None, within: SetValue | None, least: Expr = sympy.S.Zero, most: int | None = None,
) -> SetValue | None:  # fmt: skip
    """The set of a new Choice by `score`; None after an error."""
    grid = score.grain.grid(scope.stream(score.grain.stream).grid)
    if unit is None and not grid.is_units:
        scope.refuse(
            "E105", f"a choice of overlapping entries of `{score.grain.stream}` is not built yet",
            "choose units of tokens: `unit = n`",
        )  # fmt: skip
        return None
    if any(lookups(term.test) for softmax in softmaxes_of(score) for term in softmax.terms):
        scope.refuse("E105", "a score over a set that reads tensors or choices is not built yet", "")
        return None
    grains = reduction(scope, score, share, rows, unit)
    if grains is None:
        return None
    forced, candidates = (
        _units(scope, name, members, grains.rows, score) for name, members in (("force", force), ("within", within))
    )
    if forced is None or candidates is None:
        return None
    count = rule.count.bound or 0 if isinstance(rule, TopK) else most or least
    if (count * grains.unit > NUMBER_VALUE) == True:  # noqa: E712  # of a number known at the call nothing is known
        scope.refuse(
            "E203", f"units of {grains.unit} tokens, so many of them, exceed any sequence", "choose fewer units"
        )
        return None
    choice = Choice(
        scope.name, rule, grains.unit, grains.rows, grains.share, least, most, score,
        grains.heads_by, grains.rows_by, grains.unit_by, force=forced, within=candidates, span=scope.span,
    )  # fmt: skip
    if not _of_lists(scope, choice):
        return None
    scope.add(choice)
    return member(scope.name, grains.unit, grains.rows)


def _of_lists(scope: Scope, choice: Choice) -> bool:
    """Whether what it reads at the call has a number for each of its lists; an error if not."""
    for read in (one for number in choice.at_call for one in lookups(number)):
        tensor = next(known for known in scope.inputs if known.name == lookup_name(read))
        assert isinstance(tensor, Tensor)
        stranger = next((axis for axis in tensor.axes if axis == "token" or (axis, choice.share) == APART), None)
        if stranger is None:
            continue
        why = "a list has no token of its own" if stranger == "token" else "query heads of a group have one list"
        scope.refuse("E204", f"the axis `{stranger}` of `{tensor.name}` is read for a list: {why}", _instead(stranger))
        return False
    return True


def _instead(axis: str | int) -> str:
    return "use a tensor without it" if axis == "token" else "use a `kv_head` axis, or `share = head`"


def ordered(scope: Scope, least: Expr | None, most: int | None) -> bool:
    """Whether `least` leaves room below `most`, as far as it is known; an error if not."""
    if least is None or most is None or not least.is_number or least <= most:
        return True
    hint = scope.instead("least", int(least), most, Applicability.MAYBE)
    scope.refuse("E203", f"at least {least} units cannot be at most {most}", hint)
    return False


def _units(scope: Scope, name: str, members: SetValue | None, rows: int, score: Score) -> Boolean | None:
    """The test over q and k of `force` (no unit if left out) or `within` (all units); None after an error.

    rows: of the choice. A tile asks for the units of its last row, which the call may not hold.
    """
    if members is None:
        return sympy.false if name == "force" else sympy.true
    if [stream for stream, _ in members.parts] != [None]:
        scope.refuse("E201", f"`{name}` names units of tokens, not entries of a stream", "leave the stream out")
        return None
    ((_, test),) = members.parts
    if in_memory(score) and (lookups(test) or test.free_symbols - {Q, K}):
        what = "a score of cells, or one made of others"
        scope.refuse(
            "E105", f"`{name}` cannot read tensors, choices, `h` or `length` for {what}, yet", "leave them out"
        )
        return None
    if rows < LEAST_TILE and (lookups(test) or test.free_symbols - {Q, K}):
        hint = f"use sets that depend on positions alone, or choose for tiles: `rows = op({LEAST_TILE})` or more"
        scope.refuse("E105", f"`{name}` cannot read tensors, choices, `h` or `length` yet", hint)
        return None
    return test if all(_of_tile(scope, name, read, rows) for read in lookups(test)) else None


def _of_tile(scope: Scope, name: str, read: AppliedUndef, rows: int) -> bool:
    """Whether all rows of a tile read the same there, which the call then has; an error if not."""
    found = next(known for known in scope.inputs if known.name == lookup_name(read))
    if isinstance(found, Choice):
        if found.listed:
            scope.refuse(
                "E105", f"`{name}` reads `{found.name}`, which is a list for each query: not built yet",
                f"use sets of tiles of {rows} queries, or of a multiple of it",
            )  # fmt: skip
            return False
        if found.rows % rows:
            tiles = "all queries together" if rows == ALL_ROWS else f"tiles of {rows}"
            hint = f"{tiles}, or of a multiple of it, do not change within one"
            hint = "read tokens, or a set that all queries have, too" if rows == ALL_ROWS else hint
            scope.refuse("E201", f"`{name}` reads tiles of {found.rows} queries of `{found.name}` for {tiles}", hint)
            return False
    elif Q in read.free_symbols:
        scope.refuse(
            "E105", f"`{name}` reads `{found.name}` at the query, for a tile of {rows} of them: not built yet",
            "read it at the key, or at `h`",
        )  # fmt: skip
        return False
    return True
