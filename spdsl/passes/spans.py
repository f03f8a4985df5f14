"""spans: sets of whole numbers as sorted, disjoint, not touching spans [first, end), with traced comparisons.

>>> trace = Trace()
>>> seen = union([(40, 100), (0, 4), (90, 130)], trace)
>>> seen, size(seen)
([(0, 4), (40, 130)], 94)
>>> touched(seen, 16, trace), within(seen, 16, trace)  # units of 16 tokens
([(0, 1), (2, 9)], [(3, 8)])
>>> difference(seen, [(50, 60)], trace), lowest(seen, 6, trace)
([(0, 4), (40, 50), (60, 130)], [(0, 4), (40, 42)])
"""

from __future__ import annotations

from collections.abc import Iterable

from spdsl.passes.series import Trace

Spans = list[tuple[int, int]]


def union(parts: Iterable[tuple[int, int]], trace: Trace) -> Spans:
    """Spans that may be empty, overlap and stand in any order, joined."""
    ordered: Spans = []
    for part in parts:
        if trace.less(part[0], part[1]):
            place = len(ordered)
            while place and trace.less(part[0], ordered[place - 1][0]):
                place -= 1
            ordered.insert(place, part)
    joined: Spans = []
    for first, end in ordered:
        if joined and not trace.less(joined[-1][1], first):
            joined[-1] = (joined[-1][0], trace.most(joined[-1][1], end))
        else:
            joined.append((first, end))
    return joined


def intersection(left: Spans, right: Spans, trace: Trace) -> Spans:
    if len(left) == len(right) == 1:
        first, end = trace.most(left[0][0], right[0][0]), trace.least(left[0][1], right[0][1])
        return [(first, end)] if trace.less(first, end) else []
    parts = [(trace.most(a, c), trace.least(b, d)) for a, b in left for c, d in right]
    return union(parts, trace)


def difference(left: Spans, right: Spans, trace: Trace) -> Spans:
    for c, d in right:
        left = [part for a, b in left for part in ((a, trace.least(b, c)), (trace.most(a, d), b))]
    return union(left, trace)


def size(spans: Spans) -> int:
    return sum(end - first for first, end in spans)


def lowest(spans: Spans, count: int, trace: Trace) -> Spans:
    """The lowest `count` members."""
    kept: Spans = []
    for first, end in spans:
        if not trace.less(0, count):
            break
        stop = trace.least(end, first + count)
        kept.append((first, stop))
        count -= stop - first
    return kept


def within(spans: Spans, unit: int, trace: Trace) -> Spans:
    """The units that lie inside."""
    return union(((trace.ceil(a, unit), trace.floor(b, unit)) for a, b in spans), trace)


def touched(spans: Spans, unit: int, trace: Trace) -> Spans:
    """The units of which some member is inside."""
    return union(((trace.floor(a, unit), trace.ceil(b, unit)) for a, b in spans), trace)
