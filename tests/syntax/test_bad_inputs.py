"""Inputs that are no patterns: each gets a code within a second, never a traceback."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spdsl.diagnostics import Report, Source, SpatError
from spdsl.limits import BRACKETS, LIST_ITEMS, TREE_DEPTH
from spdsl.syntax.names import refusal
from spdsl.syntax.numbers import read_number
from spdsl.syntax.parse import parse
from spdsl.syntax.read import decode, read

DEEP = 10_000


def codes(text: str | bytes) -> list[str]:
    try:
        report = Report(decode(text) if isinstance(text, bytes) else Source(text))
        parse(report.source, report)
    except SpatError as error:
        return [found.code for found in error.diagnostics]
    for found in report.diagnostics:
        if found.span is not None:
            assert 0 <= found.span.start <= found.span.end <= len(report.source.text)
    return [found.code for found in report.diagnostics]


def bound(expression: str) -> str:
    return f"pattern p {{ x = {expression} }}"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", {"E007"}),
        ("# only\n# comments", {"E007"}),
        (" \t\r\n", {"E007"}),
        (b"\xef\xbb\xbf", {"E007"}),
        (b"\xff\xfe\x00p", {"E002"}),
        (b"pattern p { return \xc3\x28 }", {"E002"}),
        (b"\x7fELF\x02\x01\x01\x00\x00", {"E002"}),
        (b"a" * 2**20, {"E001"}),
        ("a" * 2**20, {"E001"}),
        (b"\x00" * 1000, {"E002"}),
        (bound("(" * DEEP + "a" + ")" * DEEP), {"E001"}),
        (bound("(" * 9000 + "a" + ")" * 9000), {"E005"}),
        (bound("f(" * 6000 + "a" + ")" * 6000), {"E005"}),
        (bound("a[" * 6000 + "a" + "]" * 6000), {"E005"}),
        (bound("[" * DEEP), {"E004"}),
        ("pattern p " + "{" * DEEP, {"E004"}),
        ("pattern p " + "{" * 9000 + "}" * 9000, {"E004"}),
        ("}" * DEEP, {"E004"}),
        (bound("-" * DEEP + "a"), {"E005"}),
        (bound("~" * DEEP + "a"), {"E005"}),
        (bound("a | " * 9000 + "a"), {"E005"}),
        (bound("a * " * 9000 + "a"), {"E005"}),
        (bound("a" + "[b]" * 6000), {"E005"}),
        (bound("f(" + "a, " * 9000 + "a)"), {"E001"}),
        ("pattern p { " + "causal " * 9000 + "}", {"E001"}),
        ("pattern p { } " * 4000, {"E001"}),
        ("a " * 60_000, {"E001"}),
        (";" * 130_000, {"E001"}),
        (bound("1" + "0" * 400), {"E006"}),
        (bound("9" * 130_000), {"E006"}),
        (bound("2147483648"), {"E006"}),
        (bound("0." + "0" * 18 + "1"), {"E006"}),
        (bound("1e400"), {"E004"}),
        (bound("nan") + "x", {"E004"}),
        ("pattern p { class = 3 }", {"E104"}),
        ("pattern class { }", {"E104"}),
        ("pattern con { }", {"E104"}),
        ("pattern p { param h = 3 }", {"E104"}),
        ("pattern torch { }", {"E104"}),
        (f"pattern {'a' * 65} {{ }}", {"E104"}),
        (bound("__import__('os').system('true')"), {"E004"}),
        (bound("{{ 7 * 7 }}"), {"E004"}),
        (bound("{% raw %}"), {"E004"}),
        (bound("${x}"), {"E004"}),
        ("pattern p { # a\r x = 1 }", {"E003"}),
        (bound("\U0001f642"), {"E003"}),
        (bound("\u0430ll"), {"E003"}),
        (bound("\uff41ll"), {"E003"}),
        ("# \u202e comment\npattern p { }", {"E003"}),
        ("pattern p {\u2028 x = 1 }", {"E003"}),
        ("\ufeffpattern p { }", {"E003"}),
        (bound("a\x0c"), {"E003"}),
        (bound("a\x1b[31m"), {"E003", "E004"}),
        ("\ud800", {"E003"}),
    ],
    ids=lambda value: ascii(value)[:40] if not isinstance(value, set) else "+".join(sorted(value)),
)
def test_a_bad_source_is_told_what_it_is(text: str | bytes, expected: set[str]) -> None:
    codes(bound("a"))  # the first call makes the parser
    gc.disable()  # a collection of what other tests left may take the second alone
    try:
        start = time.process_time()
        found = codes(text)
        taken = time.process_time() - start
    finally:
        gc.enable()
    assert taken < 1
    assert expected & set(found), found


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbfpattern p { return all }",
        b"pattern p {\r\n  return all\r\n}\r\n",
        b"pattern p {\n\treturn all\n}",
        "# \u00e9\u4e2d\U0001f642 \u2014 prose\npattern p { return all }",
        bound("(" * BRACKETS + "a" + ")" * BRACKETS),
        bound("-" * (TREE_DEPTH - 1) + "a"),
        bound("a | " * (TREE_DEPTH - 1) + "a"),
        "pattern p { " + "causal " * LIST_ITEMS + "}",
        bound("f(" + "a, " * (LIST_ITEMS - 1) + "a)"),
        f"pattern {'a' * 64} {{ }}",
        bound("0." + "0" * 16 + "1"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_up_to_the_limits_all_is_well(text: str | bytes) -> None:
    assert codes(text) == []


def test_line_ends_do_not_move_columns() -> None:
    for end in ("\n", "\r\n"):
        report = Report(decode(f"pattern p {{{end}  x = 1 2{end}}}".encode()))
        parse(report.source, report)
        (found,) = report.diagnostics
        assert found.span is not None
        assert report.source.position(found.span.start) == (2, 8)


@pytest.mark.parametrize("name", ["q", "k", "v", "h", "tokens"])
def test_words_of_every_pattern_are_refused(name: str) -> None:
    assert refusal(name, "binding") == refusal(name, "pattern") == "the generated module uses it itself"


@pytest.mark.parametrize("name", ["out", "cache", "self", "tl", "triton", "torch"])
def test_names_that_the_generated_module_uses_are_refused_for_patterns_only(name: str) -> None:
    assert refusal(name, "pattern") == "the generated module uses it itself"
    assert refusal(name, "binding") is None


def test_names_of_files_are_refused_for_patterns_only() -> None:
    for name in ("con", "NUL", "com1", "lpt9", "random", "json"):
        assert refusal(name, "pattern")
        assert refusal(name, "binding") is None
    for name in ("match", "type", "_", "lambda", "__init__", "None"):
        assert refusal(name, "binding")
    assert refusal("near", "pattern") is None


@pytest.mark.parametrize("text", ["", "-", "1.", ".5", "1/3", "1e3", "\u0661", "0x1", " 1", "1" * 19, "2147483648"])
def test_what_is_no_number(text: str) -> None:
    with pytest.raises(ValueError, match="a number"):
        read_number(text)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"directory|regular|denied"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "missing.spat")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.spat")
        with pytest.raises(OSError, match="not a regular file"):
            read(tmp_path / "pipe.spat")


WORDS = st.sampled_from(
    [
        *"pattern p x y heads dim param causal return if and or not kv all attend sliding class".split(),
        *"{ } ( ) [ ] = , | & - ~ + * / // % < <= == != ; ** ' \" # . : @ 1 0.5 1e3 99999999999".split(),
        *(" ", "\n", "\r\n", "\t", "\r", "\u0430", "\u202e", "\x00", "\ufeff"),
    ]
)


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_random_bytes_get_codes(data: bytes) -> None:
    assert all(code[0] == "E" for code in codes(data))


@given(st.lists(WORDS, max_size=80), st.sampled_from(["", " ", "\n"]))
@settings(max_examples=600, deadline=None)
def test_random_words_get_codes(words: list[str], between: str) -> None:
    text = between.join(words)
    found = codes(text)
    assert found == codes(text)
    assert found or "pattern" in text


@given(st.lists(WORDS, max_size=40))
@settings(max_examples=300, deadline=None)
def test_random_items_leave_the_pattern_after_them_alone(words: list[str]) -> None:
    soup = " ".join(word for word in words if word not in ("pattern", "\r", "\x00", "#"))
    report = Report(Source(f"pattern first {{ {soup} }}\npattern second {{ causal return all }}"))
    tree = parse(report.source, report)
    assert tree.patterns[-1].name.text == "second"
    assert len(tree.patterns[-1].items) == 2
