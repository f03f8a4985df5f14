"""How many programs share a step: never by less than what it visits."""

from __future__ import annotations

import pytest

from spdsl.runtime.launch.splits import lengths_to_try, most_visited, reach, split_count

Ranges = list[tuple[int, int, int, int]]


def window(q: int, length: int) -> Ranges:
    return [(0, min(4, length), 0, 0), (max(0, q - 511), q + 1, 0, 0)]


def anew(q: int, length: int) -> Ranges:
    """The block of 1,000 tokens that the query is in."""
    return [(q // 1000 * 1000, q + 1, 0, 0)]


def short(q: int, length: int) -> Ranges:
    """Everything, up to a length of 100."""
    return [(0, q + 1 if length < 100 else 0, 0, 0)]


def test_keys_of_ranges_count_once() -> None:
    assert reach([(0, 4, 0, 0), (2, 9, 0, 0), (5, 7, 0, 0), (20, 40, 0, 0)], 30) == 19


@pytest.mark.parametrize("most", [1, 2, 3, 64, 1000, 65536, 65600])
def test_lengths_that_are_tried_are_there(most: int) -> None:
    tried = list(lengths_to_try(most))
    assert tried[0] == most
    assert min(tried) >= 1
    assert len(tried) < 20


@pytest.mark.parametrize(
    "visits, tokens, least, most",
    [(window, 8192, 516, 516), (window, 300, 300, 300), (anew, 8000, 500, 1000), (anew, 8001, 500, 1000)],
)
def test_most_of_what_a_step_visits(visits: object, tokens: int, least: int, most: int) -> None:
    assert least <= most_visited(visits, tokens, tokens) <= most  # type: ignore[arg-type]


def test_a_set_that_ends_is_seen() -> None:
    assert most_visited(short, 150, 150) >= 50


def test_programs_of_a_step() -> None:
    assert split_count(4, 512, 132) == 4
    assert split_count(4, 65536, 132) == 66
    assert split_count(1, 10, 132) == 1
