"""scores: arithmetic of scores, `-s`, `a * s`, `s / a`, `s + t` and `s - t`, as one weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import get_args

from spdsl.ir.pattern import Combined, Query, Score, Stream
from spdsl.ir.symbols import Expr
from spdsl.passes import arithmetic
from spdsl.passes.kinds import kind_of
from spdsl.passes.names import Names
from spdsl.primitives.combined import refusal
from spdsl.primitives.word import Kind
from spdsl.syntax import tree


def combined(names: Names, expr: tree.Unary | tree.Binary, of: Callable[[tree.Expr], Score | None]) -> Score | None:
    """The score that an expression is; `of` evaluates the scores in it. None after an error."""
    match expr:
        case tree.Unary(operator="-"):
            return _sum(names, expr, [(expr.operand, -1.0)], of)
        case tree.Binary(operator="+" | "-"):
            return _sum(names, expr, [(expr.left, 1.0), (expr.right, 1.0 if expr.operator == "+" else -1.0)], of)
        case tree.Binary(operator="*") if kind_of(names, expr.left) is not Kind.SCORE:
            return _multiple(names, expr, expr.right, expr.left, of)
        case tree.Binary(operator="*" | "/"):
            return _multiple(names, expr, expr.left, expr.right, of)
    names.report.error(
        "E201", f"scores have no `{expr.operator}`", expr.span, "not a score",
        hint="scores are added and subtracted, and multiplied by numbers",
    )  # fmt: skip
    return None


def _multiple(
    names: Names, expr: tree.Binary, score: tree.Expr, factor: tree.Expr, of: Callable[[tree.Expr], Score | None]
) -> Score | None:
    if kind_of(names, factor) is Kind.SCORE:
        names.report.error(
            "E201", "a score is multiplied by a number, not by another score", factor.span, "not a number"
        )
        return None
    number = arithmetic.number(names, factor)
    if number is None or (expr.operator == "/" and not _divides(names, number, factor)):
        return None
    return _sum(names, expr, [(score, float(1 / number if expr.operator == "/" else number))], of)


def _divides(names: Names, number: Expr, at: tree.Expr) -> bool:
    if number == 0:
        names.report.error("E203", "a score is divided by 0", at.span, "it must not be 0")
    return bool(number != 0)


def _sum(
    names: Names, expr: tree.Expr, parts: list[tuple[tree.Expr, float]], of: Callable[[tree.Expr], Score | None]
) -> Score | None:
    for part, _ in parts:
        if kind_of(names, part) is not Kind.SCORE:
            names.report.error(
                "E201", "a score is expected here", part.span, "not a score",
                hint="scores are added to scores of the same grain, and multiplied by numbers",
            )  # fmt: skip
            return None
    found = [of(part) for part, _ in parts]
    scores = tuple(one for one in found if isinstance(one, get_args(Score)))
    if len(scores) < len(parts):
        return None
    reasons = (refusal(one, _stream(names, one)) for one in scores)
    if reason := next((why for why in reasons if why), None):
        names.report.error(*reason, expr.span, "not built yet" if reason[0] == "E105" else "too many")
        return None
    if not all(_alike(names, expr, scores[0], other) for other in scores[1:]):
        return None
    return _flat(scores, [weight for _, weight in parts])


def _flat(scores: Sequence[Score], weights: Sequence[float]) -> Combined:
    """Sums in sums as one."""
    terms: list[tuple[Score, float]] = []
    for score, weight in zip(scores, weights, strict=True):
        own = zip(score.parts, score.weights, strict=True) if isinstance(score, Combined) else [(score, 1.0)]
        terms += [(part, weight * factor) for part, factor in own]
    return Combined(tuple(part for part, _ in terms), tuple(weight for _, weight in terms))


def _stream(names: Names, score: Score) -> Stream:
    return next(one for one in names.inputs if isinstance(one, Stream) and one.name == score.grain.stream)


def _alike(names: Names, expr: tree.Expr, score: Score, other: Score) -> bool:
    """Whether both have one grain; an error if not."""
    grids = [one.grain.grid(_stream(names, one).grid) for one in (score, other)]
    queries = {one.name: one for one in names.inputs if isinstance(one, Query)}
    heads = [queries[one.grain.query].heads or names.query_heads for one in (score, other)]
    own = score.grain.query == other.grain.query
    if grids[0] == grids[1] and score.grain.rows == other.grain.rows and (own or heads[0] == heads[1]):
        return True
    differ = "other entries" if grids[0] != grids[1] else "other heads" if heads[0] != heads[1] else "other queries"
    names.report.error(
        "E201", f"scores of different grains are added: they have {differ}", expr.span, "not alike",
        hint="take scores of the same cells of queries and keys",
    )  # fmt: skip
    return False
