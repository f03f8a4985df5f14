"""Names syntax errors. `grammar/mistakes.toml` shows each mistake by examples; an error gets the name of the
example that fails in the same way: with the same tokens expected and the same token found.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from lark import Token, UnexpectedToken

from spdsl import resources
from spdsl.diagnostics import Applicability, Diagnostic, Hint, Span
from spdsl.syntax.build import token_span
from spdsl.syntax.grammar import ALIEN, END, fresh_parser, tokens
from spdsl.syntax.logic import condition_around, rewritten, sign_of

CODE = "E004"

_OPERANDS = frozenset({"NAME", "NUMBER", "LPAR"})
_CLOSING = {"(": ")", "[": "]"}
_WORD = re.compile(r"[A-Za-z0-9_]+")
_POSITIONS = frozenset({"q", "k", "h", "length"})
_KEYWORDS = {  # and how they are used
    "CAUSAL": "`causal` stands alone, in front of `return`",
    "HEADS": "what is declared has names: `heads query = 32, kv = 8`",
    "DIM": "what is declared has names: `dim qk = 128, v = 128`",
    "PARAM": "what is declared has a name: `param window = 512`",
    "RETURN": "write `return attend(...)`",
    "PATTERN": "write `pattern name { ... }`",
    "IF": "write `return ... if condition`",
}
_ENDS_ITEM = frozenset({"RBRACE", "RETURN", "PATTERN", "PARAM", "CAUSAL", END})
_SPELLED = {
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


@dataclass(frozen=True, slots=True)
class Mistake:
    """One entry of mistakes.toml. In `message`, `{found}` and `{before}` stand for the tokens at the place."""

    name: str
    message: str
    hint: str
    place: str  # "found": at the token; "gap": behind the token before it
    replacement: str | None
    examples: tuple[str, ...]


Signature = tuple[frozenset[str], str, str]


def diagnose(failure: Failure) -> Diagnostic:
    """The diagnostic of a syntax error."""
    special = (_hyphenated, _keyword_passed, _keyword_bound, _bracket, _missing_operator, _value_below, _other_logic)
    for told in special:
        found = told(failure)
        if found is not None:
            return found
    mistake = _table().get(_signature(failure))
    return _named(mistake, failure) if mistake else _plain(failure)


def unclosed_pattern(brace: Token) -> Diagnostic:
    hint = Hint("close the pattern with `}` in front of the next one or at the end")
    return Diagnostic(CODE, "a pattern is never closed", token_span(brace), "opened here", hints=(hint,))


def mistakes() -> tuple[Mistake, ...]:
    """All named mistakes, in the order of the file."""
    table = tomllib.loads(resources.text("grammar", "mistakes.toml"))
    return tuple(
        Mistake(
            entry["name"],
            entry["message"],
            entry.get("hint", ""),
            entry.get("place", "found"),
            entry.get("replacement"),
            tuple(entry["examples"]),
        )
        for entry in table["mistake"]
    )


def signatures(mistake: Mistake) -> Iterator[Signature]:
    """How the examples of a mistake fail; ValueError if one does not, for then it teaches nothing."""
    for example in mistake.examples:
        failure = _first_failure(example)
        if failure is None:
            raise ValueError(f"mistakes.toml: an example of {mistake.name} is no mistake: {example}")
        yield _signature(failure)


@cache
def _table() -> dict[Signature, Mistake]:
    return {signature: mistake for mistake in mistakes() for signature in signatures(mistake)}


def _first_failure(text: str) -> Failure | None:
    parser = fresh_parser()
    previous = None
    stream = tokens(text)
    for token, following in zip(stream, [*stream[1:], stream[-1]], strict=True):
        try:
            parser.feed_token(token)
        except UnexpectedToken as error:
            return Failure(frozenset(error.expected), token, following, previous)
        previous = token
    return None


def _signature(failure: Failure) -> Signature:
    kind = failure.found.type
    if kind in ALIEN:  # wrong wherever it stands
        return frozenset(), kind, "" if kind == "MALFORMED" else str(failure.found)
    if kind == "NAME" and failure.expected == {"PATTERN", END}:  # a header without its keyword, or a stray item
        return failure.expected, kind, failure.following.type
    return failure.expected, kind, str(failure.found) if kind == "COMPARE" else ""


def _hyphenated(failure: Failure) -> Diagnostic | None:
    """`my-window = 3`, `pattern sliding-window {`, `f(sink-logit = s)`: what is named was taken for a difference."""
    last = failure.at - 1 if failure.found.type in ("EQUAL", "LBRACE") else failure.at + 1
    first = failure.at - 1
    while last + 2 < len(failure.tokens) and _dashed(failure.tokens, last):
        last += 2
    while first > 1 and _dashed(failure.tokens, first - 2):
        first -= 2
    name = failure.tokens[first : last + 1]
    behind = failure.tokens[last + 1].type if last + 1 < len(failure.tokens) else END
    if len(name) < 3 or behind not in ("EQUAL", "LBRACE") or not _dashed(name, 0):
        return None
    if failure.found.type == "EQUAL" and (failure.bracket is None or _POSITIONS & {*map(str, name)}):
        return None  # a comparison, such as `q-k = 3`
    span, joined = token_span(name[0]).to(token_span(name[-1])), "_".join(name[::2])
    hint = Hint(f"write `{joined}`", Applicability.MAYBE, span, joined)
    return Diagnostic(CODE, "a name holds no `-`", span, "reads as a difference", hints=(hint,))


def _dashed(tokens: Sequence[Token], at: int) -> bool:
    """Whether a `-` and a word follow the word `at` without a space."""
    three = tokens[at : at + 3]
    return (
        len(three) == 3
        and three[1].type == "MINUS"
        and all(_WORD.fullmatch(one) for one in three[::2])
        and three[0].end_pos == three[1].start_pos
        and three[1].end_pos == three[2].start_pos
    )


def _keyword_passed(failure: Failure) -> Diagnostic | None:
    """`attend(all, causal = True)`: a keyword in place of an argument's name."""
    keyword = failure.found
    if failure.bracket is None or keyword.type not in _KEYWORDS or failure.following.type != "EQUAL":
        return None
    hint = Hint(f"it is an item of the pattern: {_KEYWORDS[keyword.type]}")
    return Diagnostic(CODE, f"`{keyword}` is a keyword and no argument", token_span(keyword), hints=(hint,))


def _keyword_bound(failure: Failure) -> Diagnostic | None:
    """`causal = True`, `heads = 4`: a keyword in place of a name."""
    keyword = failure.previous
    if keyword is None or keyword.type not in _KEYWORDS:
        return None
    sign = token_span(failure.found)
    if str(failure.found) not in ("=", ":", ":=") and (keyword.type, str(failure.found)) != ("CAUSAL", "("):
        return None
    if keyword.type != "CAUSAL":
        message, hint = f"`{keyword}` is a keyword and cannot be bound", Hint(_KEYWORDS[keyword.type])
        return Diagnostic(CODE, message, sign, f"`{failure.found}` cannot stand here", hints=(hint,))
    value = failure.following
    closing = failure.tokens[failure.at + 2 : failure.at + 3] if str(failure.found) == "(" else ()
    off = str(value).lower() in ("false", "none", "off", "no", "0")
    end = token_span(value).end if value.type in ("NAME", "NUMBER", "RPAR") else sign.end
    end = token_span(closing[0]).end if closing and closing[0].type == "RPAR" else end
    start = token_span(keyword).start if off else token_span(keyword).end
    words = "leave it out: then a query sees later keys, too" if off else "write `causal` alone"
    hint = Hint(words, Applicability.MAYBE, Span(start, end), "")
    return Diagnostic(CODE, "`causal` takes no value", Span(sign.start, end), hints=(hint,))


def _other_logic(failure: Failure) -> Diagnostic | None:
    """`not`, `and`, `or` where more than the sign changes: they bind otherwise in the languages that have them."""
    mistake = _table().get(_signature(failure))
    sign = sign_of(failure.found)
    if mistake is None or sign is None:
        return None
    condition = condition_around(failure.tokens, failure.at)
    text = rewritten(condition)
    words = "".join(str(token) for token in condition)
    if text is None or text.replace(" ", "") == words.replace(str(failure.found), sign, 1):
        return None
    span = token_span(condition[0]).to(token_span(condition[-1]))
    hint = Hint(f"write `{text}`", Applicability.MAYBE, span, text)
    return Diagnostic(CODE, mistake.message, token_span(failure.found), hints=(hint,))


def _missing_operator(failure: Failure) -> Diagnostic | None:
    """`x = a b`: the grammar takes `b` for the next item, and fails behind it."""
    alien = failure.found.type in ALIEN
    if alien or not failure.joined or failure.previous is None or failure.expected != {"EQUAL", "LPAR"}:
        return None
    hint = Hint("an operator is missing, or the next item belongs on a line of its own")
    message = f"`{failure.previous}` follows a complete expression"
    return Diagnostic(CODE, message, token_span(failure.previous), hints=(hint,))


def _value_below(failure: Failure) -> Diagnostic | None:
    """`x =` with nothing behind it: the name of the next item was taken for its value."""
    before, value = failure.earlier, failure.previous
    if failure.found.type != "EQUAL" or failure.bracket or not before or not value or before.line == value.line:
        return None
    if value.type != "NAME":
        return None
    end = token_span(before).end
    hint = Hint("write a name, a number or a call")
    return Diagnostic(CODE, f"a value is missing after `{before}`", Span(end, end), hints=(hint,))


def _bracket(failure: Failure) -> Diagnostic | None:
    """A bracket that is not closed, or closed by one of the other kind."""
    bracket = failure.bracket
    if bracket is None:
        return None
    closing = _CLOSING[str(bracket)]
    found = failure.found
    if found.type in ("RPAR", "RSQB") and str(found) != closing:
        span = token_span(found)
        hint = Hint(f"write `{closing}`", Applicability.MAYBE, span, closing)
        return Diagnostic(CODE, f"`{bracket}` is closed by `{found}`", span, f"`{closing}` is expected", hints=(hint,))
    if not failure.opens_line and found.type not in _ENDS_ITEM:
        return None
    gap = _gap(failure)
    hint = Hint(f"add `{closing}`", Applicability.MAYBE, gap, closing)
    return Diagnostic(CODE, f"`{bracket}` is never closed", token_span(bracket), "opened here", hints=(hint,))


def _gap(failure: Failure) -> Span:
    """The empty place behind the token before the error."""
    end = token_span(failure.previous).end if failure.previous else token_span(failure.found).start
    return Span(end, end)


def _named(mistake: Mistake, failure: Failure) -> Diagnostic:
    span = _gap(failure) if mistake.place == "gap" else token_span(failure.found)
    before = str(failure.previous or "")
    message = mistake.message.replace("{before}", before).replace("{found}", _shown(failure.found))
    if mistake.replacement is None:
        hints = (Hint(mistake.hint),) if mistake.hint else ()
    else:
        hints = (Hint(mistake.hint, Applicability.MAYBE, span, mistake.replacement),)
    return Diagnostic(CODE, message, span, hints=hints)


def _plain(failure: Failure) -> Diagnostic:
    found = _shown(failure.found)
    span = token_span(failure.found)
    if failure.found.type in ALIEN:
        return Diagnostic(CODE, f"{found} means nothing in this language", span)
    if failure.expected >= _OPERANDS:
        behind = f" after `{failure.previous}`" if failure.previous else ""
        return Diagnostic(CODE, f"a value is missing{behind}", _gap(failure), f"found {found}")
    wanted = sorted(_SPELLED[kind] for kind in failure.expected if kind in _SPELLED)
    label = f"expected {', '.join(wanted[:-1])} or {wanted[-1]}" if len(wanted) > 1 else f"expected {''.join(wanted)}"
    return Diagnostic(CODE, f"unexpected {found}", span, label)


def _shown(token: Token) -> str:
    if token.type == END:
        return _SPELLED[END]
    text = str(token) if len(token) <= 40 else f"{token[:40]}..."
    return f"`{text}`" if text != "`" else "a backquote"
