"""The counted tables of a report: whatever a file says, they end."""

from __future__ import annotations

import pytest

from spdsl.compiler import plan_of
from spdsl.diagnostics import Source
from spdsl.machine import counts
from spdsl.tables import Fitted

FAR = "where(q % 65537 == k % 65537)"  # repeats after more positions than are worth listing


def cells(table: Fitted, column: int) -> list[str]:
    return [str(cell) for cell in table.columns[column].cells]


def tables_of(keys: str) -> tuple[Fitted, Fitted]:
    return counts.tables(plan_of(Source(f"pattern p {{ causal return attend({keys}) }}"), None, {}))


def test_every_key_of_a_step_is_counted() -> None:
    steps, forward = tables_of("sliding(512) | first(4)")
    assert cells(steps, 1) == ["516"] * len(counts.LENGTHS)
    assert cells(forward, 0) == ["attend_forward"]


def test_what_repeats_too_seldom_is_not_counted() -> None:
    steps, forward = tables_of(FAR)
    assert cells(steps, 1) == [counts.UNKNOWN] * len(counts.LENGTHS)
    assert cells(forward, 1) == [counts.UNKNOWN]


def test_a_count_that_takes_too_long_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "MOST_STEPS", 40)
    steps, forward = tables_of("sliding(512) | dilated(64, 97)")
    assert cells(steps, 1)[-1] == counts.UNCOUNTED
    assert cells(forward, 0) == [counts.UNCOUNTED]


def test_lists_of_the_caller_are_counted_full() -> None:
    """With a bound that bound, without one every token."""
    plan = plan_of(Source("pattern p { causal t = given(most = 60) return attend(t) }"), None, {})
    steps, forward = counts.tables(plan)
    assert cells(steps, 1) == ["<= 60"] * len(counts.LENGTHS)
    assert cells(forward, 0) == ["t sorted", "attend unions", "attend_forward"]
    steps, _ = counts.tables(plan_of(Source("pattern p { causal t = given(unit = 3) return attend(t) }"), None, {}))
    assert cells(steps, 1) == [f"<= {length:,}" for length in counts.LENGTHS]


def test_gathered_keys_are_told() -> None:
    """In bytes as memory moves them."""

    def told(body: str) -> list[str]:
        return list(counts.gathered(plan_of(Source(f"pattern p {{ causal {body} return attend(t) }}"), None, {})))

    assert told("t = given(unit = 32)") == []
    (line,) = told("dim qk = 72, v = 64 t = given(unit = 6)")
    assert line.startswith("attend: no block lies in units of 6 in `t`")
    assert "272 bytes each (384 in lines of 128)" in line
    assert line.endswith("whole units of 48")
    (line,) = told("t = given()")
    assert "512 bytes each;" in line
