"""pool(score, share, rows, unit): a score at larger grains, as a further result [B, heads, row tiles, units]."""

from __future__ import annotations

from dataclasses import replace

from spdsl.ir.choice import ALL_ROWS
from spdsl.ir.pattern import Pooled, Score, in_memory
from spdsl.primitives.grains import BARE, ROWS, SHARE, UNIT, reduction
from spdsl.primitives.word import Grain, Kind, Parameter, Scope, Word

SHARE_OF_RESULT = replace(SHARE, default=Grain("head"))


def pool(scope: Scope, score: Score, share: Grain, rows: Grain, unit: Grain | None) -> Pooled | None:
    if in_memory(score):
        scope.refuse("E105", "a score of cells of queries, or one made of others, as a result is not built yet", "")
        return None
    if score.grain.rows > 1 or scope.query(score.grain.query).tail or rows.size == ALL_ROWS:
        what = f"by `{score.grain.query}`, a query of cells," if score.grain.rows > 1 else "for all or the last queries"
        scope.refuse("E105", f"results of a score {what} are not built yet", "keep a row for each query")
        return None
    grains = reduction(scope, score, share, rows, unit)
    if grains is None:
        return None
    return Pooled(
        score, grains.unit, grains.rows, grains.share, grains.heads_by, grains.rows_by, grains.unit_by, scope.span
    )


def as_it_is(scope: Scope, score: Score) -> Pooled | None:
    """A score as a result: its own heads, rows and entries."""
    own = scope.query(score.grain.query).heads
    if own is None or own == scope.query_heads:
        return pool(scope, score, Grain("head"), BARE, None)
    if own == scope.kv_heads:
        return pool(scope, score, Grain("group"), BARE, None)
    hint = "declare `heads`, with as many of the score as of the queries or the keys; or use `pool`"
    scope.refuse("E105", f"a result of {own} heads is not built yet", hint)
    return None


WORD = Word(
    "pool",
    Kind.RESULT,
    (Parameter("score", Kind.SCORE), SHARE_OF_RESULT, ROWS, UNIT),
    pool,
    "a score reduced to larger grains",
    "pattern p { causal near = attend(sliding(16)) return near, pool(mass(near), share = sum(group), unit = 8) }",
)
