"""unions: the units that tiles of neighbouring queries visit together, and the steps of a selecting kernel."""

from __future__ import annotations

from functools import lru_cache
from math import gcd

from spdsl.ir.pattern import Choice
from spdsl.passes.count import Count, Number
from spdsl.passes.series import Trace, total
from spdsl.passes.spans import size, union


@lru_cache(maxsize=512)
def tile_units(count: Count, choice: Choice, lanes: int, overlap: float) -> Number:
    """Units over all tiles of `lanes` queries of one list, summed.

    Which units a score takes is not known: at most they are all different. `overlap` is the share of that room which
    neighbours do not use because they choose alike: 0 the most, 1 the least.
    """
    stride = count.stride(choice)
    exact = True
    units = [max(1, unit // gcd(unit, lanes)) for unit in (choice.unit, stride, choice.rows)]

    def most(i: int, trace: Trace) -> int:
        nonlocal exact
        least, found = _tile(count, choice, i, lanes, trace)
        exact = exact and bool(trace.constant(int(not trace.less(least, found))))
        return found

    def least(i: int, trace: Trace) -> int:
        return _tile(count, choice, i, lanes, trace)[0]

    tiles = -(-count.length // lanes)
    found = total(most, tiles, units)
    if overlap:
        found -= round(overlap * (found - total(least, tiles, units)))
    return Number(found, exact and choice.sized)


def _tile(count: Count, choice: Choice, i: int, lanes: int, trace: Trace) -> tuple[int, int]:
    """The least and the most units of the union of one tile."""
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
