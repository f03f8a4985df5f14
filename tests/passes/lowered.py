"""Patterns as the lowering leaves them."""

from __future__ import annotations

from pathlib import Path

from spdsl.diagnostics import Report, Source
from spdsl.ir.pattern import Choice, Pattern, Softmax
from spdsl.passes.lower import lower
from spdsl.syntax.parse import parse

PATTERNS = Path(__file__).resolve().parents[2] / "patterns"


def lowered(body: str) -> Pattern:
    return meaning(f"pattern p {{ {body} }}")


def meaning(text: str) -> Pattern:
    """The one pattern of a source that has no errors."""
    report = Report(Source(text))
    found = lower(parse(report.source, report).patterns[0], report)
    report.check()
    assert found is not None
    return found


def of_file(name: str) -> Pattern:
    return meaning((PATTERNS / f"{name}.spat").read_text(encoding="utf-8"))


def choice(pattern: Pattern, name: str = "c") -> Choice:
    found = pattern.choice(name)
    assert found is not None
    return found


def softmax(pattern: Pattern, name: str) -> Softmax:
    return next(found for found in pattern.softmaxes() if found.name == name)
