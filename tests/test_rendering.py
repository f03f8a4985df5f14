"""Diagnostics as people see them, letter by letter, and as programs read them."""

from __future__ import annotations

import json
from io import StringIO

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from spdsl.diagnostics import Applicability, Diagnostic, Hint, Report, Severity, Source, Span
from spdsl.rendering import as_data, render, summary
from spdsl.syntax.parse import parse


def drawn(text: str) -> str:
    """All diagnostics of a text, rendered."""
    report = Report(Source(text, "demo.spat"))
    parse(report.source, report)
    return "".join(render(report.source, found).plain for found in report.diagnostics)


PINNED = {
    "pattern p {\n    near = sliding(4) or sink(1)\n}": """\
error[E004]: `or` is written `|`
 --> demo.spat:2:23
  |
2 |     near = sliding(4) or sink(1)
  |                       ^^
  |
  = hint: write `|`
  |
2 -     near = sliding(4) or sink(1)
2 +     near = sliding(4) | sink(1)
""",
    "pattern p {\n\tx = attend(all\n\treturn x\n}": """\
error[E004]: `(` is never closed
 --> demo.spat:2:12
  |
2 |     x = attend(all
  |               ^ opened here
  |
  = hint: add `)`
  |
2 -     x = attend(all
2 +     x = attend(all)
""",
    "pattern p { x = 4294967296 }": """\
error[E006]: number out of range
 --> demo.spat:1:17
  |
1 | pattern p { x = 4294967296 }
  |                 ^^^^^^^^^^ a number is at most 2147483647 (2^31 - 1)
""",
    "# \u4e2d\u6587\npattern p { return \u0430ll }": """\
error[E003]: forbidden character U+0430 (CYRILLIC SMALL LETTER A)
 --> demo.spat:2:20
  |
2 | pattern p { return \u0430ll }
  |                    ^
  |
  = hint: it looks like `a`
  |
2 - pattern p { return \u0430ll }
2 + pattern p { return all }
""",
    "#\u202e\npattern p { }": """\
error[E003]: invisible character U+202E (RIGHT-TO-LEFT OVERRIDE)
 --> demo.spat:1:2
  |
1 | #<U+202E>
  |  ^^^^^^^^
  |
  = note: it hides or reorders the text around it, so that the source reads differently from what it says
  = hint: remove it
  |
1 - #<U+202E>
1 + #
""",
    "pattern class { }": """\
error[E104]: `class` cannot name a pattern
 --> demo.spat:1:9
  |
1 | pattern class { }
  |         ^^^^^
  |
  = note: it is a keyword of Python, and names become arguments of a Python function
  = hint: choose another name
""",
    "": """\
error[E007]: the source holds no pattern
 --> demo.spat
  = hint: a pattern is written `pattern name { ... }`
""",
    "pattern p { return a | }": """\
error[E004]: a value is missing after `|`
 --> demo.spat:1:23
  |
1 | pattern p { return a | }
  |                       ^
  |
  = hint: write a name, a number or a call
""",
}


@pytest.mark.parametrize("text", PINNED, ids=lambda text: ascii(text)[:30])
def test_pinned(text: str) -> None:
    assert drawn(text) == PINNED[text]


def test_a_span_over_several_lines() -> None:
    source = Source("a = f(\n    1,\n    2)\nb", "demo.spat")
    found = Diagnostic("E101", "told", Span(4, 20), "all of it", severity=Severity.WARNING)
    assert source.text[4:20] == "f(\n    1,\n    2)"
    assert render(source, found).plain == (
        "warning[E101]: told\n --> demo.spat:1:5\n  |\n1 | a = f(\n  |     ^^\n...\n3 |     2)\n  |     ^^ all of it\n"
    )


def test_wide_characters_take_two_columns() -> None:
    source = Source("# \u4e2d\u6587 x")
    assert "  |   ^^^^ here\n" in render(source, Diagnostic("E101", "told", Span(2, 4), "here")).plain
    assert f"  | {' ' * 7}^ here\n" in render(source, Diagnostic("E101", "told", Span(5, 6), "here")).plain


def test_a_long_line_is_cropped_around_the_span() -> None:
    lines = render(Source("a" * 100_000), Diagnostic("E101", "told", Span(50_000, 50_002))).plain.split("\n")
    assert max(map(len, lines)) < 140
    assert lines[4].index("^") == len("1 | ...") + 60


def test_nothing_steers_the_terminal() -> None:
    source = Source("a\x1b[2Jb\x07", "na\x1bme")
    text = render(source, Diagnostic("E101", "mess\x1bage", Span(0, 1), "la\x9bbel", ("no\x08te",), (Hint("hi\rnt"),)))
    assert not any(ord(character) < 32 or 127 <= ord(character) < 160 for character in text.plain if character != "\n")


def test_colours_only_where_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    text = render(Source("a"), Diagnostic("E101", "told", Span(0, 1)))

    def printed() -> str:
        stream = StringIO()
        Console(file=stream, force_terminal=True, color_system="standard").print(text)
        return stream.getvalue()

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[1;31m" in printed()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[1;31m" not in printed()


def test_summary() -> None:
    error, warning = Diagnostic("E101", "told"), Diagnostic("W107", "told", severity=Severity.WARNING)
    assert summary([error, warning, error]) == "2 errors, 1 warning"
    assert summary([]) == ""


PLACE = {
    "type": "object",
    "properties": {"row": {"type": "integer", "minimum": 1}, "column": {"type": "integer", "minimum": 1}},
    "required": ["row", "column"],
    "additionalProperties": False,
}
EDIT = {
    "type": "object",
    "properties": {"content": {"type": "string"}, "location": PLACE, "end_location": PLACE},
    "required": ["content", "location", "end_location"],
    "additionalProperties": False,
}
HINT = {
    "type": "object",
    "properties": {
        "message": {"type": "string"},
        "applicability": {"enum": [one.value for one in Applicability]},
        "edits": {"type": "array", "items": EDIT},
    },
    "required": ["message", "applicability", "edits"],
    "additionalProperties": False,
}
SCHEMA = {
    "type": "object",
    "properties": {
        "code": {"type": "string", "pattern": "^[EW][0-9]{3}$"},
        "name": {"type": ["string", "null"]},
        "severity": {"enum": ["error", "warning", "note"]},
        "message": {"type": "string"},
        "label": {"type": "string"},
        "filename": {"type": "string"},
        "location": PLACE,
        "end_location": PLACE,
        "notes": {"type": "array", "items": {"type": "string"}},
        "hints": {"type": "array", "items": HINT},
    },
    "required": [
        *("code", "name", "severity", "message", "label", "filename"),
        *("location", "end_location", "notes", "hints"),
    ],
    "additionalProperties": False,
}


@pytest.mark.parametrize("text", PINNED, ids=lambda text: ascii(text)[:30])
def test_data_follows_the_schema(text: str) -> None:
    report = Report(Source(text, "demo.spat"))
    parse(report.source, report)
    for found in report.diagnostics:
        data = as_data(report.source, found)
        jsonschema.validate(data, SCHEMA)
        assert json.loads(json.dumps(data)) == data


def test_data_holds_the_edit() -> None:
    report = Report(Source("pattern p {\n x = a or b }", "demo.spat"))
    parse(report.source, report)
    (data,) = (as_data(report.source, found) for found in report.diagnostics)
    assert data["name"] == "syntax"
    assert data["location"] == {"row": 2, "column": 8}
    assert data["end_location"] == {"row": 2, "column": 10}
    assert data["hints"] == [
        {
            "message": "write `|`",
            "applicability": "maybe-incorrect",
            "edits": [{"content": "|", "location": {"row": 2, "column": 8}, "end_location": {"row": 2, "column": 10}}],
        }
    ]


@given(st.text(max_size=60), st.integers(0, 60), st.integers(0, 60), st.text(max_size=5))
def test_every_span_can_be_drawn(text: str, start: int, length: int, replacement: str) -> None:
    start = min(start, len(text))
    span = Span(start, min(start + length, len(text)))
    found = Diagnostic("E101", "told", span, "here", hints=(Hint("do", Applicability.MAYBE, span, replacement),))
    assert "^" in render(Source(text), found).plain
