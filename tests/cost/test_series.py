"""Sums over stretches against sums over every argument."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spdsl.passes.series import Trace, total
from spdsl.passes.spans import difference, intersection, lowest, size, union

numbers = st.integers(-40, 80)
spans = st.lists(st.tuples(numbers, numbers), max_size=4)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 300), st.integers(1, 9), st.integers(1, 7), st.integers(-50, 50), st.sampled_from([(), (4,), (6, 9)])
)
def test_any_speed_gives_the_same_sum(count: int, unit: int, other: int, shift: int, units: tuple[int, ...]) -> None:
    def function(i: int, trace: Trace) -> int:
        end = trace.least(i + 1, trace.floor(i + shift, unit) * other)
        return trace.most(end, 0) + trace.remainder(i, other)

    every = [function(i, Trace()) for i in range(count)]
    assert total(function, count, units) == sum(every)


def test_a_long_sum_walks_few_arguments() -> None:
    walked = []

    def function(i: int, trace: Trace) -> int:
        walked.append(i)
        return trace.least(i + 1, 4096)

    assert total(function, 1 << 20) == sum(min(i + 1, 4096) for i in range(1 << 20))
    assert len(walked) < 100


def test_a_remainder_that_returns_is_no_stretch() -> None:
    assert total(lambda i, trace: trace.remainder(i, 3), 10) == sum(i % 3 for i in range(10))


@settings(max_examples=60, deadline=None)
@given(spans, spans, st.integers(0, 30))
def test_spans_are_sets(a: list[tuple[int, int]], b: list[tuple[int, int]], count: int) -> None:
    one, two = (set().union(*(range(*part) for part in parts)) for parts in (a, b))
    left, right = union(a, Trace()), union(b, Trace())
    assert size(left) == len(one)
    assert size(intersection(left, right, Trace())) == len(one & two)
    assert size(difference(left, right, Trace())) == len(one - two)
    kept = lowest(left, count, Trace())
    assert {i for part in kept for i in range(*part)} == set(sorted(one)[:count])


@pytest.mark.parametrize("step", [1, 2, 5])
def test_negative_numbers_are_floored(step: int) -> None:
    assert total(lambda i, trace: trace.floor(i - 20, 3), 40, (step,)) == sum((i - 20) // 3 for i in range(40))
