"""unions: the units that tiles of neighbouring queries visit together, and the steps of a selecting kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import gcd

from spdsl.ir.pattern import Choice
from spdsl.passes.count import Count, Number
from spdsl.passes.series import Trace, total
from spdsl.passes.spans import size, touched, union


@lru_cache(maxsize=512)
def tile_units(count: Count, choice: Choice, lanes: int, overlap: float, whole: bool = False) -> Number:
    """Units over all tiles of `lanes` queries of one list, summed; or whole units, of which short ones are parts.

    Which units a score or the caller takes is not known: at most they are all different. `overlap` is the share of that
    room which neighbours do not use because they choose alike: 0 the most, 1 the least.
    """
    unit = choice.whole_unit if whole else choice.unit
    return _summed(count, choice, lanes, overlap, unit, lambda units, trace: units)


@lru_cache(maxsize=512)
def tile_blocks(count: Count, choice: Choice, lanes: int, overlap: float, block: int) -> Number:
    """Blocks of `block` gathered keys over all tiles, as `tile_units`: the last one of each tile may not be full."""

    def blocks(units: int, trace: Trace) -> int:
        return trace.ceil(units * choice.unit, block)

    return _summed(count, choice, lanes, overlap, choice.unit, blocks, block)


def _summed(
    count: Count, choice: Choice, lanes: int, overlap: float, unit: int, of: Callable[[int, Trace], int], block: int = 1
) -> Number:
    """The sum over tiles of a number `of` their units."""
    stride = count.stride(choice)
    exact = True
    units = [max(1, one // gcd(one, lanes)) for one in (choice.unit, unit, stride, choice.period, block)]

    def most(i: int, trace: Trace) -> int:
        nonlocal exact
        least, found = _tile(count, choice, i, lanes, unit, trace)
        exact = exact and bool(trace.constant(int(not trace.less(least, found))))
        return of(found, trace)

    def least(i: int, trace: Trace) -> int:
        return of(_tile(count, choice, i, lanes, unit, trace)[0], trace)

    tiles = -(-count.length // lanes)
    found = total(most, tiles, units)
    if overlap:
        found -= round(overlap * (found - total(least, tiles, units)))
    return Number(found, exact and choice.sized)


def _tile(count: Count, choice: Choice, i: int, lanes: int, unit: int, trace: Trace) -> tuple[int, int]:
    """The least and the most units of the union of one tile; where several are a whole one, of `unit` keys, of these.

    Neighbours that choose alike may still have taken each unit from another whole one.
    """
    end = trace.constant(trace.least(count.length - i * lanes, lanes))
    every, forced, taken, longest = [], [], 0, 0
    for lane in range(end):
        sets = count.units(choice, i * lanes + lane, 0, trace)
        own = trace.least(size(sets.forced), sets.room)
        free = trace.least(size(sets.free), sets.room - own)
        if lane == 0 or not trace.remainder(i * lanes + lane, choice.rows):
            taken += free  # queries of one tile of rows have one list
        longest = trace.most(longest, own + free)
        forced += sets.forced
        every += [*sets.forced, *sets.free]
    if unit != choice.unit:
        forced, every = (touched(one, unit // choice.unit, trace) for one in (forced, every))
    together = size(union(forced, trace))
    most = trace.least(size(union(every, trace)), together + taken)
    return trace.least(trace.most(longest, together), most), most


def select_steps(count: Count, choice: Choice, lanes: int, ranks: int, causal: bool) -> int:
    """Rows of `ranks` units that the programs of one list score."""
    units = -(-count.length // choice.unit)

    def steps(i: int, trace: Trace) -> int:
        end = units
        if causal:
            last = trace.least((i + 1) * lanes, count.length) - 1
            end = trace.least(end, trace.floor(last, choice.unit) + 1)
        return trace.ceil(end, ranks)

    unit = choice.unit * ranks
    return total(steps, -(-count.length // lanes), [unit // gcd(unit, lanes)])
