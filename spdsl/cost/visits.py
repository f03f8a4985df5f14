"""visits: how many tiles the kernels walk, exactly as their ranges, lists and units say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import gcd

import sympy

from spdsl.ir.conjunct import Conjunct
from spdsl.ir.plan import Sweep
from spdsl.ir.symbols import (
    K_FIRST,
    K_LAST,
    LENGTH,
    Q_BEGIN,
    Q_END,
    Q_FIRST,
    Q_LAST,
    Boolean,
    H,
    Q,
    lookups,
)
from spdsl.ir.visit import Range, Ranges
from spdsl.passes.disjuncts import TooComplex, disjuncts
from spdsl.passes.numbers import NotWhole, Values, compiled
from spdsl.passes.ranges import key_range, row_range
from spdsl.passes.series import Trace, total
from spdsl.passes.spans import size, union
from spdsl.passes.tile_choices import without_lookups
from spdsl.passes.visible import DependsOnData

Bounds = Callable[[Values, Trace], tuple[int, int]]


def row_tiles(
    sweep: Sweep, rows: int, keys: int, length: int, block_m: int, block_n: int, heads: int, origin: int = 0
) -> int:  # fmt: skip
    """Pairs of a row tile and a key block that the forward visits, over all heads.

    `length` is in tokens; of a compressed stream `keys` are entries. origin: the position of the first row.
    """

    def tile(i: int, trace: Trace) -> dict[sympy.Symbol, int]:
        first = i * block_m
        return {Q_FIRST: origin + first, Q_LAST: origin + trace.least(first + block_m, rows) - 1, LENGTH: length}

    ranges = _own(sweep, lambda visit: visit.keys, key_range)
    return _visited(ranges, tile, -(-rows // block_m), block_m, keys, block_n, heads)


def key_tiles(sweep: Sweep, rows: int, keys: int, length: int, block_m: int, block_n: int, heads: int) -> int:
    """Pairs of a key block and a row tile that dK and dV visit, over all heads."""

    def tile(i: int, trace: Trace) -> dict[sympy.Symbol, int]:
        first = i * block_n
        last = trace.least(first + block_n, keys) - 1
        return {K_FIRST: first, K_LAST: last, LENGTH: length, Q_BEGIN: 0, Q_END: rows}

    ranges = _own(sweep, lambda visit: visit.rows, row_range)
    return _visited(ranges, tile, -(-keys // block_n), block_n, rows, block_m, heads)


def step_blocks(sweep: Sweep, keys: int, length: int, block: int, width: int = 1, rest: Boolean | None = None) -> int:
    """Blocks of keys that the one query at the end visits, whatever its head; by the number of its cell of `width`; of
    `rest` in place of its test.
    """
    ranges = sweep.decode
    tests = [sweep.test, *(bound for found in ranges for bound in (found.first, found.end))]
    if rest is not None or any(map(lookups, tests)):
        conjuncts = _conjuncts(sweep if rest is None else replace(sweep, test=rest))
        single = {Q_FIRST: Q, Q_LAST: Q}
        found = [key_range(Conjunct(linears=one.linears)) for one in conjuncts]
        ranges = tuple(
            Range(*(part.xreplace(single) for part in (r.first, r.end, r.condition, r.full_first, r.full_end, r.full)))
            for r in found
        )
    values = {Q: (length - 1) // width, LENGTH: length, H: 0}
    return _blocks([_bounds(one) for one in ranges], values, keys, block, Trace())


def _own(
    sweep: Sweep, side: Callable[[Ranges], tuple[Range, ...]], solve: Callable[[Conjunct], Range]
) -> Sequence[Range]:
    """The ranges that the kernel walks; where tensors tell, those of the test with its reads taken as true."""
    ranges = side(sweep.visit) if isinstance(sweep.visit, Ranges) else None
    if ranges is not None and not any(lookups(part) for one in ranges for part in (one.first, one.end, one.condition)):
        return ranges
    return [solve(conjunct) for conjunct in _conjuncts(sweep)]


def _conjuncts(sweep: Sweep) -> tuple[Conjunct, ...]:
    try:
        return disjuncts(without_lookups(sweep.test))
    except TooComplex:
        raise DependsOnData from None


def _visited(
    ranges: Sequence[Range],
    tile: Callable[[int, Trace], dict[sympy.Symbol, int]],
    tiles: int,
    advance: int,
    count: int,
    block: int,
    heads: int,
) -> int:
    bounds = [_bounds(one) for one in ranges]
    by_head = any(H in part.free_symbols for one in ranges for part in (one.first, one.end, one.condition))
    units = list(_units(ranges, advance, block))
    found = 0
    for head in range(heads if by_head else 1):

        def blocks(i: int, trace: Trace, head: int = head) -> int:
            return _blocks(bounds, {**tile(i, trace), H: head}, count, block, trace)

        found += total(blocks, tiles, units)
    return found if by_head else found * heads


def _units(ranges: Sequence[Range], advance: int, block: int) -> Iterator[int]:
    """After how many tiles a floor of the ranges falls on a block again."""
    for one in ranges:
        steps = {1}
        for part in (one.first, one.end, one.condition):
            for found in part.atoms(sympy.floor):
                steps.add(int(sympy.fraction(sympy.together(found.args[0]))[1]))
        for step in steps:
            yield step * block // gcd(step * block, advance)


def _bounds(found: Range) -> Bounds:
    try:
        first, end, condition = (compiled(part) for part in (found.first, found.end, found.condition))
    except NotWhole:
        raise DependsOnData from None
    always = found.condition == sympy.true

    def bounds(values: Values, trace: Trace) -> tuple[int, int]:
        if not always and not trace.constant(int(bool(condition(values, trace)))):
            return 0, 0
        return first(values, trace), end(values, trace)

    return bounds


def _blocks(bounds: Sequence[Bounds], values: Values, count: int, block: int, trace: Trace) -> int:
    """Blocks of the union, inside [0, count)."""
    spans = []
    for one in bounds:
        first, end = one(values, trace)
        first, end = trace.most(first, 0), trace.least(end, count)
        if trace.less(first, end):
            spans.append((trace.floor(first, block), trace.ceil(end, block)))
    return size(union(spans, trace))
