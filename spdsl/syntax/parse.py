"""`Source -> FileTree`: the written form of a file, or every syntax error in it."""

from __future__ import annotations

from dataclasses import replace

from lark import Token

from spdsl.diagnostics import Report, Source
from spdsl.limits import PATTERNS, TOKENS
from spdsl.syntax.build import token_span
from spdsl.syntax.grammar import tokens
from spdsl.syntax.names import Role, refusal
from spdsl.syntax.numbers import read_number
from spdsl.syntax.read import check_text
from spdsl.syntax.recover import Driver
from spdsl.syntax.tree import Binding, Declaration, FileTree, Name, PatternTree


def parse(source: Source, report: Report) -> FileTree:
    """The tree of a source. Errors go to the report (E001 to E007, E104); the tree then holds what could be read."""
    text = check_text(source, report)
    if text is None:
        return FileTree(())
    stream = tokens(text)
    if len(stream) > TOKENS + 1:  # the end is one of them
        report.error("E001", f"the source has more than {TOKENS} tokens", token_span(stream[TOKENS]))
        return FileTree(())
    tree = Driver([_checked_number(token, report) for token in stream], report).run()
    if not tree.patterns and not report.failed:
        report.error("E007", "the source holds no pattern", None, hint="a pattern is written `pattern name { ... }`")
    if len(tree.patterns) > PATTERNS:
        message = f"the source holds {len(tree.patterns):,} patterns, at most {PATTERNS}"
        report.error(
            "E001", message, tree.patterns[PATTERNS].name.span, "one too many", hint="split it into several files"
        )
        return FileTree(tree.patterns[:PATTERNS])
    for pattern in tree.patterns:
        _check_names(pattern, report)
    return FileTree(tuple(_with_comment(pattern, source.text) for pattern in tree.patterns))


def _checked_number(token: Token, report: Report) -> Token:
    """The token; for a number out of range, a shorter one in its place, so that the rest is still read."""
    if token.type == "NUMBER":
        try:
            read_number(token)
        except ValueError as reason:
            report.error("E006", "number out of range", token_span(token), str(reason))
            return token.update(value=token[:9].rstrip("."))
    return token


def _check_names(pattern: PatternTree, report: Report) -> None:
    _check_name(pattern.name, "pattern", report)
    for item in pattern.items:
        if isinstance(item, Binding):
            _check_name(item.name, "binding", report)
        elif isinstance(item, Declaration) and item.keyword == "param":
            for pair in item.pairs:
                _check_name(pair.name, "binding", report)


def _check_name(name: Name, role: Role, report: Report) -> None:
    reason = refusal(name.text, role)
    if reason:
        thing = "a pattern" if role == "pattern" else "a binding"
        message = f"`{name.text[:64]}` cannot name {thing}"
        report.error("E104", message, name.span, note=reason, hint="choose another name")


def _with_comment(pattern: PatternTree, text: str) -> PatternTree:
    """Takes in the comment that ends on the line above the pattern."""
    lines = text[: pattern.span.start].split("\n")
    if lines.pop().strip():  # something stands in front of `pattern`
        return pattern
    comment: list[str] = []
    while lines and lines[-1].lstrip().startswith("#"):
        comment.insert(0, lines.pop().strip().lstrip("#").strip())
    return replace(pattern, comment="\n".join(comment))
