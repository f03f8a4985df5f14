"""Syntax errors: each named mistake is told by its name, and one broken item gives one error."""

from __future__ import annotations

import pytest

from spdsl.diagnostics import Diagnostic, Report, Source
from spdsl.syntax.mistake_table import Mistake, mistakes, signatures
from spdsl.syntax.parse import parse


def errors(text: str) -> list[Diagnostic]:
    report = Report(Source(text))
    parse(report.source, report)
    return sorted(report.diagnostics, key=lambda found: found.span.start if found.span else 0)


def told(text: str) -> list[tuple[int, str]]:
    """Line and message of each error."""
    source = Source(text)
    return [(source.position(found.span.start)[0] if found.span else 0, found.message) for found in errors(text)]


def test_no_two_mistakes_fail_alike() -> None:
    seen: dict[object, str] = {}
    for mistake in mistakes():
        for signature in signatures(mistake):
            assert seen.setdefault(signature, mistake.name) == mistake.name


@pytest.mark.parametrize("mistake", mistakes(), ids=lambda mistake: mistake.name)
def test_each_example_gets_the_message_of_its_mistake(mistake: Mistake) -> None:
    start = mistake.message.partition("{")[0]
    for example in mistake.examples:
        found = errors(example)
        assert found[0].code == "E004", example
        assert any(one.message.startswith(start) and one.hints[0].text == mistake.hint for one in found), example


def test_all_errors_of_a_file_in_one_run() -> None:
    text = """pattern a {
    x = attend(all
    y = sliding(3,)
    z =
    w = a and b
    fine = attend(all)
    return a + , b
    return fine
pattern b {
    x == 3
    u = x y
    v = 4;
    return (x]
}}
p {
    fine = attend(all)
    return x y
}
"""
    assert told(text) == [
        (1, "a pattern is never closed"),
        (2, "`(` is never closed"),
        (3, "nothing follows the `,`"),
        (4, "a value is missing after `=`"),
        (5, "`and` is written `&`"),
        (7, "a value is missing after `+`"),
        (10, "a name is bound with one `=`"),
        (11, "`y` follows a complete expression"),
        (12, "nothing ends an item: `;` is not needed"),
        (13, "`(` is closed by `]`"),
        (14, "`}` closes nothing"),
        (15, "a pattern begins with the keyword `pattern`"),
        (17, "`y` follows a complete expression"),
    ]


def test_what_is_right_is_kept_beside_what_is_wrong() -> None:
    report = Report(Source("pattern a { x = \n y = 3\n z = = 4\n return y }\npattern b { return all }"))
    first, second = parse(report.source, report).patterns
    assert len(report.diagnostics) == 2
    assert [type(item).__name__ for item in first.items] == ["Binding", "Result"]
    assert second.name.text == "b"


def test_an_item_continued_on_indented_lines_gives_one_error() -> None:
    text = "pattern a {\n    x = top_k(3 4,\n        share = group,\n        force = last(1))\n    return x\n}"
    assert told(text) == [(2, "`,` or an operator is missing after `3`")]


@pytest.mark.parametrize(
    "text, message",
    [
        ("pattern p { x = f(a", "`(` is never closed"),
        ("pattern p { x = a[b }", "`[` is never closed"),
        ("pattern p {", "a pattern is never closed"),
        ("pattern p { x = @ }", "`@` means nothing in this language"),
        ("pattern p", "`{` is missing after the name of the pattern"),
    ],
)
def test_single_errors(text: str, message: str) -> None:
    assert message in [message for _, message in told(text)]


@pytest.mark.parametrize(
    "text",
    [
        "pattern p { x = a or not b and c }",
        "pattern p { x == 3 param y == 4 }",
        "pattern p { x = !a; }",
        "pattern p { x = f(a[b) }",
        "pattern p { x = f(a} }",
        "pattern p { return a if b = 1 }",
        "pattern p x = 3 }",
        "pattern p { x 3 }",
        "pattern p { x := a) }",
    ],
)
def test_the_hints_repair_the_source(text: str) -> None:
    for _ in range(4):
        if found := errors(text):
            hint = found[0].hints[0]
            assert hint.span is not None
            assert hint.replacement is not None
            text = text[: hint.span.start] + hint.replacement + text[hint.span.end :]
    assert errors(text) == []


def test_at_most_a_hundred_errors() -> None:
    assert len(errors("pattern p {\n" + "x = ;\n" * 3000 + "}")) == 100
