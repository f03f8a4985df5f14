"""Grains: from a score per (head, query, entry) to one per (list head, tile of rows, unit).

Heads are reduced first, then rows, then entries. A bare grain means that there is nothing to reduce, or `sum` for
probabilities; how logits are reduced must be written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spdsl.diagnostics import Applicability
from spdsl.ir.choice import ALL_ROWS
from spdsl.ir.pattern import Grid, Input, Score, in_memory, softmaxes_of
from spdsl.limits import ENTRIES_OF_UNIT
from spdsl.primitives.word import Grain, Kind, Parameter, Scope, stream_of

BARE = Grain(1)
SHARE = Parameter(
    "share", Kind.GRAIN, default=Grain("group"), words=("head", "group"), planned=("layer", "union")
)  # fmt: skip
ROWS = Parameter("rows", Kind.GRAIN, default=BARE, least=1, most=ALL_ROWS - 1, sizes=(("all", ALL_ROWS),))
UNIT = Parameter("unit", Kind.GRAIN, default=None, least=1, planned=("labels",))


@dataclass(frozen=True, slots=True)
class Reduction:
    """The fields of the same names in `Choice` and `Pooled`."""

    unit: int
    rows: int
    share: str
    heads_by: str | None
    rows_by: str | None
    unit_by: str | None


def unit_of(inputs: Sequence[Input], values: Mapping[str, Any]) -> int:
    """The unit of a choice: as written, else that of its score's entries. 1 where an argument was wrong."""
    unit, score = values.get("unit"), values.get("score")
    if isinstance(unit, Grain):
        return int(unit.size)
    return score.grain.grid(stream_of(inputs, score.grain.stream).grid).stride if isinstance(score, Score) else 1


def written(grain: Grain) -> str:
    """Its size as patterns have it."""
    return "all" if grain.size == ALL_ROWS else str(grain.size)


def nearest(number: int, step: int) -> int:
    """The nearest multiple of `step` above 0, the larger of two that are as near."""
    return max(step, (2 * number + step) // (2 * step) * step)


def reduction(scope: Scope, score: Score, share: Grain, rows: Grain, unit: Grain | None) -> Reduction | None:
    """What the grains say of this score; None (and an error) where they do not fit it. No unit: the entries."""
    grid, grain_rows = score.grain.grid(scope.stream(score.grain.stream).grid), score.grain.rows
    if rows == BARE:  # left out: as the score has them
        rows = Grain(grain_rows, rows.by)
    size = grid.stride if unit is None else int(unit.size)
    several = _several_heads(scope, score, str(share.size))
    if several is None:
        return None
    if rows.size != ALL_ROWS and int(rows.size) % grain_rows:
        scope.refuse(
            "E203", f"rows = {rows.size} is no multiple of the {grain_rows} queries of a cell of the score",
            scope.instead("rows", int(rows.size), nearest(int(rows.size), grain_rows), Applicability.MACHINE),
        )  # fmt: skip
        return None
    if size % grid.stride:
        scope.refuse(
            "E203", f"unit = {size} is no multiple of {_stride(score, grid)}",
            scope.instead("unit", size, nearest(size, grid.stride), Applicability.MACHINE),
        )  # fmt: skip
        return None
    entries = len(grid.overlapping(size))
    if entries > ENTRIES_OF_UNIT:
        scope.refuse(
            "E203", f"a unit of {size} tokens overlaps {entries:,} entries of `{score.grain.stream}`, "
            f"at most {ENTRIES_OF_UNIT:,}",
            "choose smaller units, or compress into narrower or fewer cells",
        )  # fmt: skip
        return None
    finer = unit is not None and (size != grid.stride or not grid.is_units)
    if scope.query(score.grain.query).tail and rows.size != ALL_ROWS:
        scope.refuse(
            "E206", f"`{score.grain.query}` are the last queries of a call alone, which say nothing of others",
            "reduce them to one row: `rows = sum(all)`, or `mean(all)` or `max(all)`",
        )  # fmt: skip
        return None
    if in_memory(score) and (rows.size == ALL_ROWS or scope.query(score.grain.query).source is not None):
        scope.refuse(
            "E105", "a score of cells of queries, or one made of others, is not built yet for all queries of a call, "
            "queries of cells or the last queries",
            "take a score of single queries, and tiles of them",
        )  # fmt: skip
        return None
    alike = not any(softmax.product.asked for softmax in softmaxes_of(score))  # all heads and rows have one number
    together = rows.size != grain_rows
    by = {"share": None, "rows": None, "unit": None} | {
        name: grain.by or ("sum" if score.probability else "max" if alike and name != "unit" else "")
        for name, grain, reduces in (("share", share, several), ("rows", rows, together), ("unit", unit, finer))
        if grain is not None and reduces
    }
    for name, grain in (("share", share), ("rows", rows), ("unit", unit)):
        if grain is not None and by[name] == "":
            by_name, others = ("sum", "`max(...)`") if name == "share" else ("max", "`sum(...)`")
            sure = Applicability.MACHINE if name == "share" else Applicability.MAYBE
            scope.refuse(
                "E206", f"`{name} = {written(grain)}` does not say how logits are reduced",
                scope.given_as(
                    name, f"{by_name}({written(grain)})", sure,
                    f", or {others} or `mean(...)`; or take `softmax(...)` of the score",
                ),
            )  # fmt: skip
            return None
    return Reduction(size, int(rows.size), str(share.size), by["share"], by["rows"], by["unit"])


def _stride(score: Score, grid: Grid) -> str:
    cells = f"the {grid.stride} tokens of a cell of the score"
    return cells if score.grain.cells > 1 else f"the stride {grid.stride} of `{score.grain.stream}`"


def _several_heads(scope: Scope, score: Score, share: str) -> bool | None:
    """Whether one list is made from several heads of the score, as far as they are known; None after an error."""
    own = scope.query(score.grain.query).heads
    have, want = own or scope.query_heads, scope.query_heads if share == "head" else scope.kv_heads
    if share == "head" and own is None:
        return False
    if have is None or want is None:
        return True
    if have % want:
        scope.refuse("E306", f"{have} heads of the score cannot be shared out over {want} lists", "")
        return None
    return have != want
