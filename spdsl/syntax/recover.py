"""Drives the parser over the tokens and goes on after an error, so that one run finds all errors of a file.

The state before each item is kept. After an error the parser returns to it, and the text is taken up again at
the next thing that opens an item: a keyword or `name =` at the head of a line that is not indented deeper than
the broken item, a `}`, or the next `pattern`. So one broken item gives one error.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lark import Token, UnexpectedToken
from lark.parsers.lalr_interactive_parser import InteractiveParser

from spdsl.diagnostics import MOST_ERRORS, Report
from spdsl.limits import BRACKETS
from spdsl.syntax.build import Refused, token_span
from spdsl.syntax.failure import Failure
from spdsl.syntax.grammar import END, fresh_parser, saved
from spdsl.syntax.mistakes import diagnose, unclosed_pattern
from spdsl.syntax.tree import FileTree

_KEYWORDS = frozenset({"HEADS", "DIM", "PARAM", "CAUSAL", "RETURN"})
_OPERAND_ENDS = frozenset({"NAME", "NUMBER", "RPAR", "RSQB"})
_BEFORE_ITEM = _OPERAND_ENDS | {"CAUSAL", "LBRACE"}
_CLOSING = {"RPAR": "LPAR", "RSQB": "LSQB"}


@dataclass(slots=True)
class Driver:
    """One pass over the tokens of a file; the last token is the end."""

    tokens: list[Token]
    report: Report
    parser: InteractiveParser = field(default_factory=fresh_parser)
    at: int = 0
    open: list[Token] = field(default_factory=list)  # brackets of the current item
    brace: Token | None = None  # of the current pattern
    start: int = 0  # where the current item, or what stands between patterns, begins
    before: InteractiveParser = field(init=False)  # the state in front of it

    def __post_init__(self) -> None:
        self.before = saved(self.parser)

    def run(self) -> FileTree:
        """The tree of all that could be read; the errors go to the report."""
        while self.at < len(self.tokens) and len(self.report.diagnostics) < MOST_ERRORS:
            ahead = saved(self.parser) if self._opens_item() else None
            try:
                self._feed()
            except UnexpectedToken as error:
                self._unexpected(frozenset(error.expected))
            except Refused as refused:
                self.report.error(refused.code, refused.message, refused.span)
                if refused.code == "E001":
                    break
                self._resume()
            else:
                self._advance(ahead)
        tree = self.parser.result
        return tree if isinstance(tree, FileTree) else FileTree(())

    def _feed(self) -> None:
        token = self.tokens[self.at]
        if token.type in ("LPAR", "LSQB") and len(self.open) == BRACKETS:
            raise Refused("E005", f"more than {BRACKETS} brackets are open at once", token_span(token))
        self.parser.result = self.parser.feed_token(token)

    def _opens_item(self) -> bool:
        token = self.tokens[self.at]
        titled = self._kind_before(self.at) == "PATTERN"  # `pattern causal` names a pattern, it opens no item
        if token.type == "PATTERN" or (token.type in _KEYWORDS and not self.open and not titled):
            return True
        return token.type == "NAME" and not self.open and self._kind_before(self.at) in _BEFORE_ITEM

    def _advance(self, ahead: InteractiveParser | None) -> None:
        """After a token was accepted."""
        token = self.tokens[self.at]
        if ahead is not None:
            self.start, self.before = self.at, ahead
            self.open.clear()
        if token.type in _CLOSING.values():
            self.open.append(token)
        elif token.type in _CLOSING:
            self.open.pop()
        self.at += 1
        if token.type == "LBRACE":
            self._enter(token)
        elif token.type == "RBRACE":
            self._leave()

    def _enter(self, brace: Token) -> None:
        self.brace = brace
        self.start, self.before = self.at, saved(self.parser)

    def _leave(self) -> None:
        self.brace = None
        self.open.clear()
        self.start, self.before = self.at, saved(self.parser)

    def _unexpected(self, expected: frozenset[str]) -> None:
        token = self.tokens[self.at]
        if self.brace is not None and token.type in ("PATTERN", END) and self._insert("RBRACE", "}"):
            if self.brace.type == "LBRACE":  # otherwise the missing `{` was reported already
                self.report.add(unclosed_pattern(self.brace))
            self._leave()
            return
        self.report.add(diagnose(self._failure(expected)))
        body = token.type in _KEYWORDS or token.type in ("NAME", "RBRACE")
        if body and expected == {"LBRACE"} and self._insert("LBRACE", "{"):
            self._enter(token)
            return
        self._resume()

    def _failure(self, expected: frozenset[str]) -> Failure:
        token = self.tokens[self.at]
        before = [None, None, *self.tokens[max(self.at - 2, 0) : self.at]]
        return Failure(
            expected,
            found=token,
            following=self.tokens[min(self.at + 1, len(self.tokens) - 1)],
            previous=before[-1],
            earlier=before[-2],
            bracket=self.open[-1] if self.open else None,
            opens_line=self._opens_line(self.at),
            joined=self._joined(),
            tokens=self.tokens,
            at=self.at,
        )

    def _joined(self) -> bool:
        """Whether the item begins in the middle of a line, right behind a complete expression."""
        return (
            self.start == self.at - 1 and not self._leads(self.start) and self._kind_before(self.start) in _OPERAND_ENDS
        )

    def _kind_before(self, at: int) -> str:
        return self.tokens[at - 1].type if at else ""

    def _insert(self, kind: str, text: str) -> bool:
        """Feeds a token that the text lacks; False, and nothing is changed, if it does not fit."""
        probe = saved(self.parser)
        try:
            probe.feed_token(Token(kind, text, token_span(self.tokens[self.at]).start))
        except (UnexpectedToken, Refused):
            return False
        self.parser = probe
        return True

    def _resume(self) -> None:
        """Back to the state before the broken item, on to the next place that can follow it."""
        self.parser = saved(self.before)
        self.open.clear()
        if self.brace is None:
            self._resume_between_patterns()
            return
        self.start = self.at = self._next_item()

    def _next_item(self) -> int:
        inner = 0  # braces that the broken item opened itself
        for at in range(self.start, len(self.tokens)):
            kind = self.tokens[at].type
            if kind == "RBRACE" and inner:
                inner -= 1
            elif at > self.start and self._can_follow(at):
                return at
            inner += kind == "LBRACE"
        return len(self.tokens) - 1

    def _resume_between_patterns(self) -> None:
        """On to the body, if the rest of the line opens one; otherwise to the next pattern, or behind stray `}`."""
        if self.tokens[self.at].type == "RBRACE":
            while self.tokens[self.at].type == "RBRACE":
                self.at += 1
            self.start = self.at
            return
        brace = self.at
        while self.tokens[brace].type not in ("LBRACE", "PATTERN", END) and self._same_line(brace + 1):
            brace += 1
        if self.tokens[brace].type == "LBRACE":
            self.at = brace
            for kind, text in (("PATTERN", "pattern"), ("NAME", "unnamed"), ("LBRACE", "{")):
                self._insert(kind, text)
            self.at += 1
            self._enter(self.tokens[brace])
            return
        after = max(self.at, self.start + 1)
        last = len(self.tokens) - 1
        self.start = self.at = next((at for at in range(after, last) if self.tokens[at].type == "PATTERN"), last)

    def _same_line(self, at: int) -> bool:
        return self.tokens[at].line == self.tokens[self.at].line

    def _can_follow(self, at: int) -> bool:
        kind = self.tokens[at].type
        if kind in ("RBRACE", "PATTERN", END):
            return True
        if not self._opens_line(at):
            return False
        return kind in _KEYWORDS or (kind == "NAME" and self.tokens[at + 1].type in ("EQUAL", "LPAR"))

    def _leads(self, at: int) -> bool:
        return at == 0 or self.tokens[at - 1].line != self.tokens[at].line

    def _opens_line(self, at: int) -> bool:
        """Whether the token is the first of its line, at most as far right as the current item."""
        token = self.tokens[at]
        item = self.tokens[min(self.start, len(self.tokens) - 1)]
        return self._leads(at) and (token.column or 0) <= (item.column or 0)
