"""q_mean = compress(width, of = q, by = mean | max, partial = keep): a query for each cell of `width` queries.

Cells count from position 0 of the sequence, and a call that holds a part of one pools that part. SpargeAttn,
SeerAttention and Video Sparse Attention choose tiles by such queries (arXiv 2502.18137, 2410.13276, 2505.13389).
"""

from __future__ import annotations

from spdsl.diagnostics import Applicability
from spdsl.ir.pattern import Query, QueryCells
from spdsl.primitives.word import Cells, Scope

POOLED_BY = ("mean", "max")


def of_queries(
    scope: Scope, source: Query, width: int, stride: int | None, before: int, partial: str, by: Cells
) -> Query | None:
    """The pooled query; None after an error."""
    if source.source is not None:
        scope.refuse("E105", "cells of cells of queries are not built yet", "pool the queries themselves")
        return None
    if by.by not in POOLED_BY:
        scope.refuse("E105", f"queries pooled by `{by.by}` are not built yet", "use `by = mean` or `by = max`")
        return None
    if stride not in (None, width) or before:
        wanted = scope.instead("stride", stride or width, width, Applicability.MAYBE)
        scope.refuse("E203", "each query lies in one cell: a stride other than the width does not fit", wanted)
        return None
    if partial != "keep":
        hint = scope.given_as("partial", "keep", Applicability.MACHINE, "")
        scope.refuse("E203", "each query needs a cell, those behind the last whole one, too", hint)
        return None
    made = Query(scope.name, source.heads, source.dim, QueryCells(source.name, width, by.by), span=scope.span)
    scope.add(made)
    return made
