"""Habits of other languages: logic in words, keywords with `=`, names with `-`. The hint is what was meant."""

# ruff: noqa: E501 (one case a line)

from __future__ import annotations

import pytest

import spdsl
from spdsl.diagnostics import Applicability, Diagnostic, Report, Source
from spdsl.syntax.parse import parse


def errors(text: str) -> list[Diagnostic]:
    report = Report(Source(text))
    parse(report.source, report)
    return sorted(report.diagnostics, key=lambda found: found.span.start if found.span else 0)


def mended(text: str) -> str:
    """The text with the first hint carried out."""
    (hint,) = errors(text)[0].hints
    assert hint.applicability is Applicability.MAYBE
    assert hint.span is not None
    assert hint.replacement is not None
    return text[: hint.span.start] + hint.replacement + text[hint.span.end :]


LOGIC = {  # bindings of Python: not before and before or, all of them looser than comparisons, `|` and `&`
    "not k % 2 == 0": "~(k % 2 == 0)",
    "not k": "~ k",
    "not m[k]": "~ m[k]",
    "not (k > 3)": "~ (k > 3)",
    "not a | b": "~(a | b)",
    "not k > 3 and q > 3": "~(k > 3) & q > 3",
    "not k > 3 or not h == 1": "~(k > 3) | ~(h == 1)",
    "not not k > 3": "~~(k > 3)",
    "not (not k > 3)": "~(~(k > 3))",
    "not (q > 3 or k < 3) and k > 0": "~(q > 3 | k < 3) & k > 0",
    "q > 3 and k > 3": "q > 3 & k > 3",
    "q > 3 or k > 3": "q > 3 | k > 3",
    "q > 3 | k < 3 and k > 0": "(q > 3 | k < 3) & k > 0",
    "k > 0 and q > 3 | k < 3": "k > 0 & (q > 3 | k < 3)",
    "q > 3 or k < 3 and k > 0": "q > 3 | k < 3 & k > 0",
    "q > 3 & k < 3 or k > 0": "q > 3 & k < 3 | k > 0",
    "q > 3 | k < 3 && k > 0": "(q > 3 | k < 3) & k > 0",
    "!k % 2 == 0": "~(k % 2 == 0)",
    "!m[k]": "~m[k]",
    "!k > 3 & q > 3": "~(k > 3) & q > 3",  # tighter than `&` and `|` wherever there is a `!`
    "!k > 3 | !q > 3 & h == 1": "~(k > 3) | ~(q > 3) & h == 1",
    "h == 1 && !m[k] | q > 3": "h == 1 & (~m[k] | q > 3)",
    "min(q, 3) > 1 and not max(q, k) > 9": "min(q, 3) > 1 & ~(max(q, k) > 9)",
    "not near(3, a = q or k) == 1": "~(near(3, a = q | k) == 1)",
}


@pytest.mark.parametrize("written, meant", LOGIC.items())
@pytest.mark.parametrize(
    "around",
    ["pattern p {{ x = where({}) }}", "pattern p {{\n x = {}\n y = x\n}}", "pattern p {{ return a if {} return b }}"],
)
def test_logic_in_words(written: str, meant: str, around: str) -> None:
    text = mended(around.format(written))
    assert text == around.format(meant)
    assert errors(text) == []


def test_a_long_condition_gets_the_sign_alone() -> None:
    (found,) = errors("pattern p { x = not k == 0 " + "| k == 0 " * 200 + "}")
    assert found.hints[0].replacement == "~"


@pytest.mark.parametrize(
    "text, line, message, fixed",
    [
        ("pattern p {\n    causal = True\n    return x\n}", 2, "`causal` takes no value", "pattern p {\n    causal\n    return x\n}"),
        ("pattern p {\n    causal: true\n    return x\n}", 2, "`causal` takes no value", "pattern p {\n    causal\n    return x\n}"),
        ("pattern p {\n    causal(True)\n    return x\n}", 2, "`causal` takes no value", "pattern p {\n    causal\n    return x\n}"),
        ("pattern p {\n    causal()\n    return x\n}", 2, "`causal` takes no value", "pattern p {\n    causal\n    return x\n}"),
        ("pattern p {\n    y = 3\n    causal = 1\n    return x\n}", 3, "`causal` takes no value", "pattern p {\n    y = 3\n    causal\n    return x\n}"),
        ("pattern p {\n    causal = False\n    return x\n}", 2, "`causal` takes no value", "pattern p {\n    \n    return x\n}"),
    ],
)  # fmt: skip
def test_causal_has_no_value(text: str, line: int, message: str, fixed: str) -> None:
    (found,) = errors(text)
    assert found.span is not None
    assert (Source(text).position(found.span.start)[0], found.message) == (line, message)
    assert mended(text) == fixed
    assert errors(fixed) == []


@pytest.mark.parametrize("keyword", ["heads", "dim", "param", "return", "if"])
@pytest.mark.parametrize("sign", ["=", ":", ":="])
def test_keywords_are_not_bound(keyword: str, sign: str) -> None:
    text = f"pattern p {{\n    causal\n    x = attend(all)\n    {'return x if' if keyword == 'if' else keyword} {sign} 4\n    return x\n}}"
    (found,) = errors(text)
    assert found.span is not None
    assert Source(text).position(found.span.start)[0] == 4
    assert found.message == f"`{keyword}` is a keyword and cannot be bound"
    assert f"{keyword} " in found.hints[0].text


def test_a_value_is_still_missing_below() -> None:
    (found,) = errors("pattern p {\n    x =\n    y = 3\n    return x\n}")
    assert found.message == "a value is missing after `=`"


@pytest.mark.parametrize(
    "written, meant",
    [
        ("pattern sliding-window { causal return x }", "pattern sliding_window { causal return x }"),
        ("pattern sliding-window-2 { causal return x }", "pattern sliding_window_2 { causal return x }"),
        ("pattern causal-window { causal return x }", "pattern causal_window { causal return x }"),
        ("pattern p { param my-window = 4 return x }", "pattern p { param my_window = 4 return x }"),
        ("pattern p { param a = 3, my-window = 4 return x }", "pattern p { param a = 3, my_window = 4 return x }"),
        (
            "pattern p { a = 3\n far-off-keys = sink(3)\n return x }",
            "pattern p { a = 3\n far_off_keys = sink(3)\n return x }",
        ),
        ("pattern p { return attend(all, sink-logit = s) }", "pattern p { return attend(all, sink_logit = s) }"),
    ],
)
def test_names_hold_no_dash(written: str, meant: str) -> None:
    assert errors(written)[0].message == "a name holds no `-`"
    assert mended(written) == meant
    assert errors(meant) == []


@pytest.mark.parametrize("condition", ["q-k = 3", "q - k = 3", "a - b = 3"])
def test_a_difference_stays_one(condition: str) -> None:
    (found,) = errors(f"pattern p {{ x = where({condition}) }}")
    assert found.message == "two values are compared with `==`"


def test_what_was_meant_compiles() -> None:
    text = "pattern p {\n    causal\n    return attend(where(not k % 2 == 0 or k > q - 9))\n}"
    assert spdsl.check(mended(text)) == []


@pytest.mark.parametrize("keyword", ["causal", "param", "if"])
def test_keywords_are_no_arguments(keyword: str) -> None:
    (found,) = errors(f"pattern p {{ return attend(all, {keyword} = True) }}")
    assert found.message == f"`{keyword}` is a keyword and no argument"
    assert "item of the pattern" in found.hints[0].text
