"""Fixing: what is applied, what is not, and that nothing else of the text changes."""

from __future__ import annotations

import os
import stat
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import spdsl
from spdsl import compiler
from spdsl.cli import main
from spdsl.cli.output import rewrite
from spdsl.diagnostics import Applicability, Diagnostic, Hint, Severity, Source, Span
from spdsl.fixing import Edit, apart, applied, edits_of, fix

SPANS = st.tuples(st.integers(0, 30), st.integers(0, 8)).map(lambda pair: Span(pair[0], min(30, sum(pair))))
EDITS = st.lists(st.builds(Edit, SPANS, st.text("xyz", max_size=3), st.just("W501")), max_size=12).map(
    lambda edits: sorted(edits, key=lambda edit: (edit.span.start, edit.span.end, edit.text))
)
TEXT = "abcdefghijklmnopqrstuvwABCDEFG"  # 30 letters


@given(EDITS)
def test_edits_that_are_kept_do_not_overlap(edits: list[Edit]) -> None:
    kept = apart(edits)
    for first, second in pairwise(kept):
        assert first.span.end <= second.span.start
        assert first.span != second.span
    assert not edits or kept[0] == edits[0]


@given(EDITS)
def test_text_outside_of_the_edits_is_the_same(edits: list[Edit]) -> None:
    kept = apart(edits)
    gone = {i for edit in kept for i in range(edit.span.start, edit.span.end)}
    after = applied(Source(TEXT), kept).text
    assert "".join(c for c in after if c not in "xyz") == "".join(c for i, c in enumerate(TEXT) if i not in gone)
    assert len(after) == len(TEXT) - len(gone) + sum(len(edit.text) for edit in kept)


def finding(code: str, start: int, end: int, text: str, how: Applicability = Applicability.MACHINE) -> Diagnostic:
    hint = Hint("", how, Span(start, end), text)
    return Diagnostic(code, "", Span(start, end), hints=(hint,), severity=Severity.WARNING)


def letters(source: Source) -> list[Diagnostic]:
    """Every `a` is to be `b`; every `b` behind an `a` may be `c`; `!` is an error."""
    found = [finding("W501", i, i + 1, "b") for i, c in enumerate(source.text) if c == "a"]
    found += [finding("W502", i, i + 1, "c", Applicability.MAYBE) for i, c in enumerate(source.text) if c == "b"]
    found += [finding("W503", i, i + 1, "!") for i, c in enumerate(source.text) if c == "d"]
    return found + [Diagnostic("E101", "", Span(i, i + 1)) for i, c in enumerate(source.text) if c == "!"]


@settings(deadline=None)
@given(st.text("abcde \n\r#", max_size=20))
def test_fixing_twice_is_fixing_once(text: str) -> None:
    once = fix(Source(text), letters)
    assert once.source.text == text.replace("a", "b")  # `d` stays: its fix would be an error
    again = fix(once.source, letters)
    assert again.source == once.source
    assert again.changes == ()
    assert len(once.changes) == text.count("a")


def test_only_machine_applicable_hints_are_edits() -> None:
    found = [finding("W501", 0, 1, "b"), finding("W502", 2, 3, "c", Applicability.MAYBE)]
    assert edits_of([*found, *found]) == [Edit(Span(0, 1), "b", "W501")]


def test_an_error_that_hides_another_is_fixed() -> None:
    text = "pattern p { causal\u200b return attend(slidng(3)) }"
    done = fix(Source(text), lambda source: compiler.check(source, {}))
    assert done.source.text == text.replace("\u200b", "")
    assert [one.code for one in done.left] == ["E102"]


PATTERN = (
    "# A comment: 48 is not touched.  \r\npattern p {{\r\n    param block = {} # here\r\n    causal\r\n"
    "    rank = softmax(dot(compress(16)))\r\n"
    "    return attend(top_k(4, score = rank, unit = max(block), force = last(1)))\r\n}}\r\n"
)


@pytest.mark.parametrize("before, after", [(48, 64), (80, 64), (40, 64), (24, 32)])
def test_a_unit_becomes_the_nearest_of_whole_blocks(before: int, after: int) -> None:
    """40 and 24 are no multiples of the stride: first that error is fixed, then the blocks of 48."""
    done = fix(Source(PATTERN.format(before)), lambda source: compiler.check(source, {}))
    assert done.source.text == PATTERN.format(after)
    assert done.left == ()


def test_an_overridden_number_is_not_rewritten() -> None:
    source = Source(PATTERN.format(64))
    done = fix(source, lambda text: compiler.check(text, compiler.as_params({"block": 48})))
    assert done.source == source
    assert [one.code for one in done.left] == ["W502"]


def test_the_command_writes_the_file_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "p.spat"
    path.write_bytes(b"\xef\xbb\xbf" + PATTERN.format(48).encode())
    path.chmod(0o640)
    link = tmp_path / "link.spat"
    link.symlink_to(path)
    result = CliRunner().invoke(main, ["check", "--fix", str(link)])
    assert result.exit_code == 0
    assert "link.spat:3: W502 fixed: `48` -> `64`" in result.stderr
    assert path.read_bytes() == b"\xef\xbb\xbf" + PATTERN.format(64).encode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert link.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link.spat", "p.spat"]


def test_the_command_leaves_what_may_change_the_meaning(tmp_path: Path) -> None:
    path = tmp_path / "p.spat"
    path.write_text("pattern p { causal dim qk = 72 return attend(all) }")
    result = CliRunner().invoke(main, ["check", "--fix", str(path)])
    assert result.exit_code == 1
    assert "left to you, as a fix may change what is meant: W506" in result.stderr
    assert path.read_text() == "pattern p { causal dim qk = 72 return attend(all) }"


def test_a_file_that_has_changed_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "p.spat"
    path.write_text("new")
    with pytest.raises(OSError, match="changed"):
        rewrite(path, "old", "fixed")
    assert path.read_text() == "new"


def test_names_in_a_circle_have_no_digits() -> None:
    text = """pattern p { param a = 12 causal b = a a = b
        entries = compress(32, a) coarse = attend(entries)
        return gate(coarse, attend(top_k(2, score = mass(coarse), unit = a)))
    }"""
    found = spdsl.check(text)
    assert "E103" in {one.code for one in found}
    assert all(hint.replacement is None for one in found for hint in one.hints if one.code != "E103")


@pytest.mark.parametrize("rest", ["attend(sliding(n))", "attend(all) if length > n return attend(sink(1))"])
def test_a_number_that_means_something_else_too_is_left(rest: str) -> None:
    text = f"pattern p {{ param n = 100 causal expect(length = 4096, page = n) return {rest} }}"
    assert fix(Source(text), lambda source: compiler.check(source, {})).source.text == text
    alone = text.replace(rest, "attend(all)")
    assert "n = 128" in fix(Source(alone), lambda source: compiler.check(source, {})).source.text
