"""series: exact sums of functions that are made of affine parts, without walking every argument.

A function of a position that is built from affine terms, comparisons and floors is affine on each stretch on which
every comparison comes out the same and every floor moves evenly. A `Trace` notes both. If the two ends of a stretch
agree, all between them do, so the stretch sums up as an arithmetic series; if not, it is halved. Nothing is estimated.

The keys of a window of 64, over a million queries, from a few dozen of them:

>>> walked = []
>>> def keys(q, trace):
...     walked.append(q)
...     return trace.least(q + 1, 64)
>>> total(keys, 1_000_000) == sum(min(q + 1, 64) for q in range(1_000_000))
True
>>> len(walked) < 50
True
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import lcm

from spdsl.budget import spend

EVALUATION = 4  # steps of one evaluation of a function of a few spans


class Trace:
    """What one evaluation compared and divided, in order."""

    __slots__ = ("notes",)

    def __init__(self) -> None:
        self.notes: list[tuple[int, int]] = []

    def less(self, a: int, b: int) -> bool:
        below = a < b
        self.notes.append((int(below), 0))
        return below

    def equal(self, a: int, b: int) -> bool:
        return not self.less(a, b) and not self.less(b, a)

    def least(self, a: int, b: int) -> int:
        return b if self.less(b, a) else a

    def most(self, a: int, b: int) -> int:
        return b if self.less(a, b) else a

    def floor(self, a: int, unit: int) -> int:
        """a // unit for unit > 0"""
        if unit != 1:
            self.notes.append((a, unit))
        return a // unit

    def ceil(self, a: int, unit: int) -> int:
        return -self.floor(-a, unit)

    def remainder(self, a: int, unit: int) -> int:
        """a % unit for unit > 0"""
        self.notes.append((a, -unit))
        return a % unit

    def constant(self, value: int) -> int:
        """A number that must stay as it is: how many times something is done."""
        self.notes.append((value, 0))
        return value


Function = Callable[[int, Trace], int]


def total(function: Function, count: int, units: Iterable[int] = ()) -> int:
    """The sum of function(i) for i in range(count). `units` are what it divides by: they only decide the speed."""
    step = _step(list(units), count)
    return sum(_series(function, first, step, -(-(count - first) // step)) for first in range(min(step, count)))


def _step(units: list[int], count: int) -> int:
    """Neighbours that share a step of lcm(units) or lie on one stretch between multiples of a unit."""
    whole = lcm(*units) if units else 1
    if whole == 1:
        return 1
    along = whole * max(1, count // whole).bit_length()
    between = sum(count // unit for unit in set(units) if unit > 1) * min(units).bit_length()
    return whole if along <= between else 1


def _series(function: Function, first: int, step: int, count: int) -> int:
    if count < 1:
        return 0
    known = _known(function, first)
    if count == 1:
        return known[0]
    whole, waiting = 0, [(0, known, count - 1, _known(function, first + step * (count - 1)))]
    # A stretch is (i, f(i), j, f(j)); the last value of each is counted by the next one.
    while waiting:
        i, left, j, right = waiting.pop()
        if j == i + 1:
            whole += left[0]
        elif _agree(left[1], right[1], j - i):
            whole += (left[0] + right[0]) * (j - i + 1) // 2 - right[0]
        else:
            middle = (i + j) // 2
            known = _known(function, first + step * middle)
            waiting += [(middle, known, j, right), (i, left, middle, known)]
    return whole + _known(function, first + step * (count - 1))[0]


def _known(function: Function, place: int) -> tuple[int, list[tuple[int, int]]]:
    spend(EVALUATION)
    trace = Trace()
    return function(place, trace), trace.notes


def _agree(left: list[tuple[int, int]], right: list[tuple[int, int]], apart: int) -> bool:
    """Whether all comparisons came out alike, and each division moves evenly or not at all."""
    if left == right:
        return True
    if len(left) != len(right):
        return False
    for (a, unit), (b, other) in zip(left, right, strict=True):
        if unit != other:
            return False
        if a == b:
            continue
        evenly = unit != 0 and (b - a) % (unit * apart) == 0
        if not evenly and (unit <= 0 or a // unit != b // unit):
            return False
    return True
