"""Builds the tree while the parser reduces, bottom up, so that no nesting of the source makes anything recurse.

The methods bear the names of the grammar's rules. Their children include every token, which gives the spans.
They keep no state: the parser may go back and reduce the same text twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from lark import Token, Transformer

from spdsl.diagnostics import Span
from spdsl.limits import LIST_ITEMS, TREE_DEPTH
from spdsl.syntax.numbers import read_number
from spdsl.syntax.tree import (
    Argument,
    Binary,
    Binding,
    Call,
    Causal,
    Declaration,
    Expr,
    FileTree,
    Item,
    Name,
    Number,
    Pair,
    PatternTree,
    Policy,
    Restrict,
    Result,
    Unary,
)

Node = TypeVar("Node")
Spanned = TypeVar("Spanned", Item, PatternTree)


class Refused(Exception):
    """The construct at `span` goes beyond a limit; `code` and `message` say which."""

    def __init__(self, code: str, message: str, span: Span) -> None:
        super().__init__(message)
        self.code, self.message, self.span = code, message, span


def token_span(token: Token) -> Span:
    """Tokens that the lexer made always have their places."""
    start = token.start_pos or 0
    return Span(start, start + len(token))


def _name(token: Token) -> Name:
    return Name(str(token), token_span(token))


def _deeper(span: Span, *parts: Expr) -> int:
    depth = 1 + max((part.depth for part in parts), default=0)
    if depth > TREE_DEPTH:
        raise Refused("E005", f"an expression is nested more than {TREE_DEPTH} deep", span)
    return depth


def _appended(before: tuple[Node, ...], last: Node, place: Span) -> tuple[Node, ...]:
    if len(before) == LIST_ITEMS:
        raise Refused("E001", f"a list has more than {LIST_ITEMS} elements", place)
    return (*before, last)


class Builder(Transformer[Token, FileTree]):
    def start(self, children: list[tuple[PatternTree, ...]]) -> FileTree:
        return FileTree(children[0])

    # lists

    def none(self, children: Sequence[object]) -> tuple[object, ...]:
        return ()

    def one(self, children: list[Node]) -> tuple[Node, ...]:
        return (children[0],)

    def more(self, children: tuple[tuple[Node, ...], Token, Node]) -> tuple[Node, ...]:
        before, comma, last = children
        return _appended(before, last, token_span(comma))

    def follow(self, children: tuple[tuple[Spanned, ...], Spanned]) -> tuple[Spanned, ...]:
        before, last = children
        return _appended(before, last, last.span)

    # patterns and items

    def pattern(self, children: tuple[Token, Token, Token, tuple[Item, ...], Token]) -> PatternTree:
        keyword, name, _, items, closing = children
        return PatternTree(_name(name), items, "", token_span(keyword).to(token_span(closing)))

    def pair(self, children: tuple[Token, Token, Expr]) -> Pair:
        name, _, value = children
        return Pair(_name(name), value)

    def declaration(self, children: tuple[Token, tuple[Pair, ...]]) -> Declaration:
        keyword, pairs = children
        return Declaration(str(keyword), pairs, token_span(keyword).to(pairs[-1].value.span))

    def causal(self, children: list[Token]) -> Causal:
        return Causal(token_span(children[0]))

    def binding(self, children: tuple[Token, Token, Expr]) -> Binding:
        name, _, value = children
        return Binding(_name(name), value, token_span(name).to(value.span))

    def policy(self, children: list[Call]) -> Policy:
        return Policy(children[0], children[0].span)

    def result(self, children: tuple[Token, tuple[Expr, ...]]) -> Result:
        keyword, values = children
        return Result(values, None, token_span(keyword).to(values[-1].span))

    def guarded(self, children: tuple[Token, tuple[Expr, ...], Token, Expr]) -> Result:
        keyword, values, _, condition = children
        return Result(values, condition, token_span(keyword).to(condition.span))

    # expressions

    def binary(self, children: tuple[Expr, Token, Expr]) -> Binary:
        left, operator, right = children
        span = left.span.to(right.span)
        return Binary(str(operator), left, right, span, _deeper(span, left, right))

    def unary(self, children: tuple[Token, Expr]) -> Unary:
        operator, operand = children
        span = token_span(operator).to(operand.span)
        return Unary(str(operator), operand, span, _deeper(span, operand))

    def restrict(self, children: tuple[Expr, Token, Expr, Token]) -> Restrict:
        base, _, index, closing = children
        span = base.span.to(token_span(closing))
        return Restrict(base, index, span, _deeper(span, base, index))

    def group(self, children: tuple[Token, Expr, Token]) -> Expr:
        opening, inner, closing = children
        return replace(inner, span=token_span(opening).to(token_span(closing)))

    def name(self, children: list[Token]) -> Name:
        return _name(children[0])

    def number(self, children: list[Token]) -> Number:
        return Number(read_number(children[0]), token_span(children[0]))

    def bare_call(self, children: tuple[Token, Token, Token]) -> Call:
        function, _, closing = children
        return Call(_name(function), (), token_span(function).to(token_span(closing)), 1)

    def call(self, children: tuple[Token, Token, tuple[Argument, ...], Token]) -> Call:
        function, _, arguments, closing = children
        span = token_span(function).to(token_span(closing))
        return Call(_name(function), arguments, span, _deeper(span, *(argument.value for argument in arguments)))

    def positional(self, children: list[Expr]) -> Argument:
        return Argument(None, children[0])

    def named(self, children: tuple[Token, Token, Expr]) -> Argument:
        label, _, value = children
        return Argument(_name(label), value)
