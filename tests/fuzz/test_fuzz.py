"""A minute of fuzzing with fixed seeds: nothing but diagnostics, none of them malformed, within the limits.

`make fuzz` goes on for hours. A case that fails here is `python -m tests.fuzz.campaign --show SEED`.
"""

from __future__ import annotations

import pytest

from spdsl import api
from spdsl.primitives.registry import WORDS
from tests.fuzz import examine as examining
from tests.fuzz.campaign import smaller, source
from tests.fuzz.examine import examine
from tests.fuzz.growth import WAYS, Growth
from tests.fuzz.mutations import corpus
from tests.fuzz.programs import Programs

CHUNKS, CASES = 6, 60
SLOWER = 2.0  # than the machine of the limits, or busy beside


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_sources_end_in_diagnostics(chunk: int) -> None:
    sources = corpus()
    failed = []
    for number in range(chunk * CASES, (chunk + 1) * CASES):
        kind, text = source(number, sources)
        finding = examine(text, compiles=number % 10 == 0, fixes=number % 7 == 0, slower=SLOWER)
        if finding.wrong:
            failed.append((number, kind, finding.wrong))
    assert failed == []


def test_programs_hold_every_word_and_many_are_valid() -> None:
    texts = [Programs(seed).source() for seed in range(300)]
    missing = [word for word in WORDS if not any(f"{word}(" in text for text in texts)]
    assert missing == []
    valid = [text for text in texts[:80] if not any(one.code.startswith("E") for one in api.check(text))]
    assert len(valid) >= 16  # a fifth: of 200 programs some 46


def test_cases_are_the_same_in_every_run() -> None:
    sources = corpus()
    for number in range(30):
        assert source(number, sources) == source(number, sources)
    assert {way(Growth(3), 20) for way in WAYS} == {way(Growth(3), 20) for way in WAYS}


def test_a_failing_case_is_seen_and_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded faults: an exception, an endless loop, a diagnostic beyond the text."""

    def fails(text: str, **options: object) -> list[object]:
        if "sink" in text:
            raise ZeroDivisionError("seeded")
        return []

    def endless(text: str, **options: object) -> list[object]:
        while True:  # a signal is heard between two steps of Python, not within a function of C
            pass

    monkeypatch.setattr(examining.api, "check", fails)
    assert "ZeroDivisionError" in examine("pattern p { return attend(sink(4)) }").wrong[0]
    assert smaller("pattern p { return attend(sink(4)) }", compiles=False) == "sink"

    monkeypatch.setattr(examining, "CHECK_SECONDS", 0.05)
    monkeypatch.setattr(examining.api, "check", endless)
    assert "ended after" in examine("pattern p { }").wrong[0]

    found = api.compiler.check(api.Source("pattern p { return attend(slid(4)) }"), {})
    monkeypatch.setattr(examining.api, "check", lambda text, **options: found)
    assert any("outside" in one for one in examine("{").wrong)
