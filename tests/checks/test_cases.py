"""Every finding about the machine is raised at its place with its numbers, and gone where the pattern is put right."""

from __future__ import annotations

import pytest

from spdsl import compiler
from spdsl.catalogue import entries
from spdsl.checks import CHECKS
from spdsl.checks.view import Setting
from spdsl.diagnostics import Diagnostic, Severity, Source
from spdsl.fixing import Edit, applied
from spdsl.targets import find
from tests.checks.cases import CASES, Case

IDS = [f"{case.code}-{i}" for i, case in enumerate(CASES)]


def setting(case: Case) -> Setting:
    return Setting((find(case.target),) if case.target else ())


def found(case: Case, text: str) -> list[Diagnostic]:
    return compiler.check(Source(text), {}, setting(case))


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_raised_alone_with_its_numbers_at_its_place(case: Case) -> None:
    findings = found(case, case.text)
    assert {one.code for one in findings} == {case.code}
    one = findings[0]
    assert case.message in one.message
    assert one.span is not None
    place = case.text[one.span.start : one.span.end]
    assert place == case.place if case.place else place in case.wrong or case.wrong in place or case.target
    assert one.severity is (Severity.ERROR if case.code.startswith("E") else Severity.WARNING)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_nothing_is_left_to_say_about_the_corrected_pattern(case: Case) -> None:
    assert found(case, case.fixed) == []


@pytest.mark.full
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_corrected_pattern_compiles(case: Case) -> None:
    made = compiler.compile(Source(case.fixed), None, {}, setting(case))
    assert made.diagnostics == ()
    assert "def attention(" in made.text


@pytest.mark.parametrize("case", [case for case in CASES if case.applied], ids=lambda case: case.code)
def test_a_hint_writes_the_correction(case: Case) -> None:
    source = Source(case.text)
    edits = [
        Edit(hint.span, hint.replacement, one.code) for one in found(case, case.text) for hint in one.hints
        if hint.span is not None and hint.replacement is not None
    ]  # fmt: skip
    assert case.fixed in [applied(source, [edit]).text for edit in edits]


def test_every_code_of_the_machine_has_a_case() -> None:
    codes = {code for code in entries() if code.startswith(("W5", "E52"))}
    assert codes - {"W510"} == {case.code for case in CASES}  # W510: tests/cost


def test_every_check_is_listed_once() -> None:
    assert len(set(CHECKS)) == len(CHECKS)
