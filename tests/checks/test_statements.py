"""`expect` and `allow`: what they become, what they refuse, and which warnings they silence."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import spdsl
from spdsl import compiler
from spdsl.cli import main
from spdsl.diagnostics import Report, Source, SpatError
from spdsl.ir.pattern import Expected, Pattern
from spdsl.passes.lower import lower
from spdsl.syntax.parse import parse


def lowered(body: str) -> Pattern:
    report = Report(Source(f"pattern p {{ {body} return attend(all) }}"))
    (tree,) = parse(report.source, report).patterns
    meaning = lower(tree, report)
    report.check()
    assert meaning is not None
    return meaning


def test_what_is_expected() -> None:
    assert lowered("").expected == Expected(None, 1, None)
    meaning = lowered("param n = 64 expect(length = 1024 * n, batch = 3, page = n) allow(W402, W501)")
    assert meaning.expected == Expected(65536, 3, 64)
    assert meaning.allowed == ("W402", "W501")


REFUSED = [
    ("allow(W49)", "E202", "W49", "no code of a warning"),
    ("allow(W403, E203)", "E202", "E203", "`E203` is an error"),
    ("allow(3)", "E202", "3", "the code of a warning is expected"),
    ("allow()", "E202", "allow()", "needs `codes`"),
    ("allow(W402) allow(W501)", "E106", "allow(W501)", "`allow` is written twice"),
    ("expect(length = 9) expect(page = 64)", "E106", "expect(page = 64)", "`expect` is written twice"),
    ("expect(length = 0)", "E203", "0", "at least 1"),
    ("expect(length = length)", "E309", "length", "not known when compiling"),
    ("expect(page = 8)", "E203", "8", "at least 16"),
    ("expect(page = 48)", "E203", "expect(page = 48)", "no power of two"),
    ("expect(size = 48)", "E202", "size", "no parameter `size`"),
    ("x = expect(length = 9)", "E205", "expect(length = 9)", "a statement has no value"),
    ("sliding(9)", "E205", "sliding(9)", "stands alone"),
    ("max(3, 4)", "E205", "max(3, 4)", "stands alone"),
    ("alow(W402)", "E102", "alow", "unknown word"),
    ("keep(3)", "E105", "keep", "not built yet"),
]


@pytest.mark.parametrize("body, code, place, message", REFUSED, ids=[body for body, *_ in REFUSED])
def test_refused(body: str, code: str, place: str, message: str) -> None:
    text = f"pattern p {{ {body} return attend(all) }}"
    (found,) = spdsl.check(text)
    assert found.code == code
    assert message in found.message
    assert found.span is not None
    assert text[found.span.start : found.span.end] == place


def test_a_statement_is_no_set() -> None:
    assert [one.code for one in spdsl.check("pattern p { return attend(allow(W402)) }")] == ["E201"]


@pytest.mark.parametrize("text", ["W49", "w501", "W5O1"])
def test_near_codes_are_proposed(text: str) -> None:
    (found,) = spdsl.check(f"pattern p {{ allow({text}) return attend(all) }}")
    assert bool(found.hints[0].replacement) is (text != "W49")


WARNED = {
    "W107": "causal near = sliding(3) return attend(all)",
    "W401": "return attend(all) if train",
    "W402": "causal return attend(sliding(9) - sliding(2))",
    "W403": "causal c = top_k(4, score = dot(compress(64)), share = head) return merge(attend(c), attend(sink(4)))",
    "W506": "causal dim qk = 72 return attend(all)",
}


@pytest.mark.parametrize("code", WARNED)
def test_a_warning_of_any_stage_is_allowed_from_inside_and_outside(code: str) -> None:
    body = WARNED[code]
    assert {one.code for one in spdsl.check(f"pattern p {{ {body} }}")} == {code}
    assert spdsl.check(f"pattern p {{ allow({code}) {body} }}") == []
    assert spdsl.check(f"pattern p {{ {body} }}", allow=(code,)) == []
    others = set(WARNED) - {code}
    assert len(spdsl.check(f"pattern p {{ {body} }}", allow=others)) > 0


def test_allowing_in_one_pattern_is_not_allowing_in_the_next() -> None:
    body = WARNED["W506"]
    assert len(spdsl.check(f"pattern a {{ allow(W506) {body} }} pattern b {{ {body} }}")) == 1


def test_no_error_is_allowed() -> None:
    text = "pattern p { causal return attend(where(q * k < 9)) }"
    assert [one.code for one in spdsl.check(text, length=65536, allow=("E521",))] == ["E521"]
    with pytest.raises(SpatError):
        compiler.compile(Source(text.replace("{ ", "{ expect(length = 65536) ")), None, {})


@pytest.mark.parametrize(
    "text, words", [("1x", "no number of tokens"), ("0", "no number"), ("4096M", "below 2**31"), ("-3", "no number")]
)
def test_lengths_that_are_none(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "p.spat"
    path.write_text("pattern p { return attend(all) }")
    result = CliRunner().invoke(main, ["check", str(path), f"--length={text}"])
    assert result.exit_code == 2
    assert words in result.stderr


def test_options_of_the_command(tmp_path: Path) -> None:
    path = tmp_path / "p.spat"
    path.write_text("pattern p { causal dim qk = 72 return attend(where(q * k < 9)) }")

    def spdsl(*options: str) -> Result:
        return CliRunner().invoke(main, ["check", str(path), *options])

    assert spdsl("--length", "64k").stderr.endswith("1 error, 1 warning\n")
    assert spdsl("--allow", "w506").exit_code == 0
    assert "is an error" in spdsl("--allow", "E203").stderr
    assert "did you mean h200" in spdsl("--target", "h20").stderr
