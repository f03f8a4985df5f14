"""Where costs cross, and published selectors on plain numbers."""

from __future__ import annotations

from fractions import Fraction

import pytest

from spdsl.cost.crossing import Crossing, crossings, page_share, selector_length, told

LENGTHS = [1024 << i for i in range(11)]


@pytest.mark.parametrize("place", [1025, 5000, 65536, 1_000_003])
def test_a_crossing_is_found_to_the_token(place: int) -> None:
    found = crossings(lambda n: float(place), lambda n: float(n) + 0.5, LENGTHS)
    assert found == [Crossing(place, wins=True)]


def test_to_the_grain_where_one_is_asked_for() -> None:
    assert crossings(lambda n: 5000.0, float, LENGTHS, grain=256) == [Crossing(5120, wins=True)]


def test_it_may_cross_twice() -> None:
    found = crossings(lambda n: abs(n - 30_000) / 10.0, lambda n: 1000.0, LENGTHS)
    assert found == [Crossing(20_001, wins=True), Crossing(40_000, wins=False)]
    assert told(found, False, LENGTHS) == "faster than dense from 20,001 tokens, slower than dense from 40,000 tokens"


def test_never_and_always_are_said() -> None:
    assert told([], False, LENGTHS) == "never faster than dense up to 1,048,576 tokens"
    assert told([], True, LENGTHS) == "always faster than dense from 1,024 to 1,048,576 tokens"


@pytest.mark.parametrize(("attention", "length"), [(541_982_720, 51_600), (944_635_904, 100_800)])
def test_the_indexer_of_dsa(attention: int, length: int) -> None:
    """16,384 FLOP for each pair and 119,275,520 for each token against the attention over 2,048 tokens."""
    found = selector_length(16_384, 119_275_520, attention)
    assert found is not None
    assert found == pytest.approx(length, abs=51)
    cost = [16_384 * n // 2 + 119_275_520 for n in (found - 1, found)]
    assert cost[0] < attention <= cost[1]


def test_a_selector_without_pairs_never_eats_what_it_saves() -> None:
    assert selector_length(0, 10, 20) is None


def test_quest_reads_an_eighth() -> None:
    """Pages of 16 and a budget of 4096 at 64k: 1 / 16 + 256 pages of 4096."""
    assert page_share(16, 4096, 65536) == Fraction(1, 16) + Fraction(256, 4096) == Fraction(1, 8)
    assert page_share(16, 4096, 2048) > 1
