"""The parser that `grammar/spat.lark` describes, made once per process, and the tokens of a text."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import islice

from lark import Lark, Token
from lark.parsers.lalr_interactive_parser import InteractiveParser

from spdsl import resources
from spdsl.limits import TOKENS
from spdsl.syntax.build import Builder

END = "$END"

# Terminals that no rule holds: what does not belong into a source at all.
ALIEN = ("FOREIGN", "OPERATOR", "MALFORMED", "STRAY")


class _KeepAlien:
    """Makes lark keep the terminals that no rule uses."""

    always_accept = ALIEN

    def process(self, stream: Iterator[Token]) -> Iterator[Token]:
        return stream


@cache
def _lark() -> Lark:
    return Lark(
        resources.text("grammar", "spat.lark"),
        parser="lalr",
        lexer="basic",
        keep_all_tokens=True,
        postlex=_KeepAlien(),
        transformer=Builder(),
    )


def fresh_parser() -> InteractiveParser:
    return _lark().parse_interactive()


def saved(parser: InteractiveParser) -> InteractiveParser:
    """The parser's state, to come back to. The values are shared: the builder never changes one."""
    copied: InteractiveParser = parser.copy(deepcopy_values=False)  # type: ignore[no-untyped-call]
    return copied


def tokens(text: str) -> list[Token]:
    """The tokens of the text, one more than the limit at most, and an end token. No text fails: see ALIEN."""
    stream = list(islice(_lark().lex(text), TOKENS + 1))
    if not stream:
        return [Token(END, "", 0, 1, 1)]
    last = stream[-1]
    end = (last.start_pos or 0) + len(last)
    return [*stream, Token(END, "", end, last.line, (last.column or 0) + len(last))]
