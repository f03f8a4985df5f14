"""Where the parser stopped, and how its tokens are told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lark import Token

from spdsl.diagnostics import Span
from spdsl.syntax.build import token_span
from spdsl.syntax.grammar import END

CODE = "E004"  # of every syntax error

SPELLED = {
    "NAME": "a name",
    "NUMBER": "a number",
    "PATTERN": "`pattern`",
    "LBRACE": "`{`",
    "RBRACE": "`}`",
    "LPAR": "`(`",
    "RPAR": "`)`",
    "LSQB": "`[`",
    "RSQB": "`]`",
    "EQUAL": "`=`",
    "COMMA": "`,`",
    "IF": "`if`",
    END: "the end of the file",
}


@dataclass(frozen=True, slots=True)
class Failure:
    """Where the parser stopped. `joined`: the item begins on the line on which the one before it ends."""

    expected: frozenset[str]
    found: Token
    following: Token
    previous: Token | None
    earlier: Token | None = None  # the token before the previous one
    bracket: Token | None = None  # the innermost open one
    opens_line: bool = False
    joined: bool = False
    tokens: Sequence[Token] = ()  # of the whole file
    at: int = 0  # the one that was found


def gap(failure: Failure) -> Span:
    """The empty place behind the token before the error."""
    end = token_span(failure.previous).end if failure.previous else token_span(failure.found).start
    return Span(end, end)


def shown(token: Token) -> str:
    if token.type == END:
        return SPELLED[END]
    text = str(token) if len(token) <= 40 else f"{token[:40]}..."
    return f"`{text}`" if text != "`" else "a backquote"
