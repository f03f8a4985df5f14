"""What a source means as a tree, and where each node stands."""

from __future__ import annotations

from fractions import Fraction

import pytest

from spdsl import resources
from spdsl.diagnostics import Report, Source, Span
from spdsl.syntax.parse import parse
from spdsl.syntax.read import read
from spdsl.syntax.tree import (
    Argument,
    Binary,
    Binding,
    Call,
    Causal,
    Declaration,
    Expr,
    FileTree,
    Name,
    Number,
    Pair,
    Policy,
    Restrict,
    Result,
    Unary,
)

NOWHERE = Span(0, 0)  # spans do not take part in comparisons


def tree_of(text: str) -> FileTree:
    report = Report(Source(text))
    tree = parse(report.source, report)
    assert report.diagnostics == []
    return tree


def expression(text: str) -> Expr:
    (item,) = tree_of(f"pattern p {{ x = {text} }}").patterns[0].items
    assert isinstance(item, Binding)
    return item.value


def name(text: str) -> Name:
    return Name(text, NOWHERE)


def binary(operator: str, left: Expr, right: Expr) -> Binary:
    return Binary(operator, left, right, NOWHERE, 0)


A, B, C = name("a"), name("b"), name("c")


@pytest.mark.parametrize(
    "text, meant",
    [
        ("a | b & c", binary("|", A, binary("&", B, C))),
        ("(a | b) & c", binary("&", binary("|", A, B), C)),
        ("a < b & b < c", binary("&", binary("<", A, B), binary("<", B, C))),
        ("a - b - c", binary("-", binary("-", A, B), C)),
        ("a - (b - c)", binary("-", A, binary("-", B, C))),
        ("a + b * c", binary("+", A, binary("*", B, C))),
        ("a / b // c % a", binary("%", binary("//", binary("/", A, B), C), A)),
        ("-a * b", binary("*", Unary("-", A, NOWHERE, 0), B)),
        ("~-a[b]", Unary("~", Unary("-", Restrict(A, B, NOWHERE, 0), NOWHERE, 0), NOWHERE, 0)),
        ("a == b", binary("==", A, B)),
        ("a[b][c]", Restrict(Restrict(A, B, NOWHERE, 0), C, NOWHERE, 0)),
        ("a()", Call(A, (), NOWHERE, 0)),
        ("a(b, c = 2)", Call(A, (Argument(None, B), Argument(C, Number(Fraction(2), NOWHERE))), NOWHERE, 0)),
        ("a(heads = b, dim = c)", Call(A, (Argument(name("heads"), B), Argument(name("dim"), C)), NOWHERE, 0)),
        ("0.1", Number(Fraction(1, 10), NOWHERE)),
        ("2147483647", Number(Fraction(2**31 - 1), NOWHERE)),
        ("007", Number(Fraction(7), NOWHERE)),
    ],
)
def test_expressions(text: str, meant: Expr) -> None:
    assert _without_depth(expression(text)) == _without_depth(meant)


def _without_depth(tree: Expr) -> str:
    """Depth takes part in no comparison of meaning here: the expected trees are written without."""
    match tree:
        case Name(text):
            return text
        case Number(value):
            return str(value)
        case Unary(operator, operand):
            return f"({operator} {_without_depth(operand)})"
        case Binary(operator, left, right):
            return f"({_without_depth(left)} {operator} {_without_depth(right)})"
        case Restrict(base, index):
            return f"{_without_depth(base)}[{_without_depth(index)}]"
        case Call(function, arguments):
            words = [f"{one.name.text if one.name else ''}={_without_depth(one.value)}" for one in arguments]
            return f"{function.text}({', '.join(words)})"


def test_items() -> None:
    tree = tree_of(
        "pattern p { heads query = 8, kv = 2 dim qk = 4 param n = 3 causal x = a keep(x) return a, b if c return a }"
    )
    heads, dim, param, causal, binding, policy, guarded, result = tree.patterns[0].items
    eight, two = Number(Fraction(8), NOWHERE), Number(Fraction(2), NOWHERE)
    assert heads == Declaration("heads", (Pair(name("query"), eight), Pair(name("kv"), two)), NOWHERE)
    assert isinstance(dim, Declaration)
    assert dim.keyword == "dim"
    assert isinstance(param, Declaration)
    assert param.keyword == "param"
    assert causal == Causal(NOWHERE)
    assert binding == Binding(name("x"), A, NOWHERE)
    assert isinstance(policy, Policy)
    assert policy.call.function == name("keep")
    assert guarded == Result((A, B), C, NOWHERE)
    assert result == Result((A,), None, NOWHERE)


def test_a_file_holds_patterns_with_their_comments() -> None:
    tree = tree_of(
        "# A file.\n\n# The first.\n# Two lines.\npattern a { return all }\n\npattern b { return all } # after\n"
    )
    assert [pattern.name.text for pattern in tree.patterns] == ["a", "b"]
    assert [pattern.comment for pattern in tree.patterns] == ["The first.\nTwo lines.", ""]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("start", ["", "# \u00e9\u4e2d comment\t\n", "\t  "])
def test_spans_are_the_text(start: str, end: str) -> None:
    text = f"{start}pattern p {{{end}    x = (a | b)[c] & f(1, y = ~d){end}    return x, a if b{end}}}"
    pattern = tree_of(text).patterns[0]
    binding, result = pattern.items
    assert isinstance(binding, Binding)
    assert isinstance(result, Result)
    assert isinstance(binding.value, Binary)
    assert isinstance(binding.value.left, Restrict)
    assert isinstance(binding.value.right, Call)
    assert _slice(text, pattern.span) == text[len(start) :]
    assert _slice(text, binding.span) == "x = (a | b)[c] & f(1, y = ~d)"
    assert _slice(text, binding.value.left.span) == "(a | b)[c]"
    assert _slice(text, binding.value.left.base.span) == "(a | b)"
    assert _slice(text, binding.value.right.span) == "f(1, y = ~d)"
    assert _slice(text, binding.value.right.arguments[1].value.span) == "~d"
    assert _slice(text, result.span) == "return x, a if b"


def _slice(text: str, span: Span) -> str:
    return text[span.start : span.end]


def test_depth_counts_operations() -> None:
    assert expression("a").depth == 1
    assert expression("((a))").depth == 1
    assert expression("f(a, -b)[c]").depth == 4


def test_our_own_patterns_parse() -> None:
    for path in sorted(resources.folder("patterns").glob("*.spat")):
        source = read(path)
        report = Report(source)
        tree = parse(source, report)
        assert report.diagnostics == [], path.name
        assert path.stem in [pattern.name.text for pattern in tree.patterns]


def test_words_that_begin_like_keywords_are_names() -> None:
    assert expression("patterns | ifs | returned | causal_mask | android | notes") is not None
