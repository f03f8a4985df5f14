"""selection: how the score of a unit follows from the entries that it overlaps, and which units are forced or allowed."""

from __future__ import annotations

import sympy

from spdsl.ir import interval
from spdsl.ir.pattern import Choice, Grid, Pattern, Stream, Tensor
from spdsl.ir.plan import ChoicePlan
from spdsl.ir.symbols import K_FIRST, Q_FIRST, Q_LAST, Boolean, Q, lookup_name, lookups


def selection(pattern: Pattern, choice: Choice) -> ChoicePlan:
    """The plan of a selected choice."""
    assert choice.score is not None
    stream = pattern.input(choice.score.stream)
    assert isinstance(stream, Stream)
    first, overlaps = overlap(stream.grid, choice.unit)
    weights = overlaps if choice.unit_by == "sum" else tuple(1.0 for _ in overlaps)
    started = K_FIRST <= Q if pattern.causal else sympy.true
    softmax = choice.score.softmax
    tests = [term.test for term in softmax.terms] + ([softmax.bias] if softmax.bias is not None else [])
    names = dict.fromkeys(lookup_name(read) for test in tests for read in lookups(test))
    reads = tuple(found for found in map(pattern.input, names) if isinstance(found, Tensor | Choice))
    forced, allowed = sympy.And(_of_unit(choice.force), started), sympy.And(_of_unit(choice.within), started)
    return ChoicePlan(choice, forced, allowed, first, weights, reads)


def overlap(grid: Grid, unit: int) -> tuple[int, tuple[float, ...]]:
    """Of the entries that share tokens with unit 0: the number of the first, and |entry & unit| / stride of each.

    Stride divides unit, so unit j has the same overlaps with entries j * unit / stride further on. NSA (arXiv 2502.11089,
    eq. 9) has 1, 2, 2, 2, 1 from entry -1 on for cells of 32 at stride 16 and units of 64.
    """
    first = -(-(1 - grid.width + grid.before) // grid.stride)
    overlaps = []
    entry = first
    while (start := entry * grid.stride - grid.before) < unit:
        shared = min(start + grid.width, unit) - max(start, 0)
        overlaps.append(shared / grid.stride)
        entry += 1
    return first, tuple(overlaps)


def _of_unit(test: Boolean) -> Boolean:
    """Whether some token of the unit from k_first to k_last passes the test, for the query at q."""
    return interval.may(test).xreplace({Q_FIRST: Q, Q_LAST: Q})
