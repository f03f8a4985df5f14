"""mistaken_names: syntax errors around a name: one with a `-` in it, a keyword where a name belongs."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lark import Token

from spdsl.diagnostics import Applicability, Diagnostic, Hint, Span
from spdsl.syntax.build import token_span
from spdsl.syntax.failure import CODE, Failure
from spdsl.syntax.grammar import END

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


def hyphenated(failure: Failure) -> Diagnostic | None:
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
        and all(_WORD.fullmatch(word) for word in three[::2])
        and three[0].end_pos == three[1].start_pos
        and three[1].end_pos == three[2].start_pos
    )


def keyword_passed(failure: Failure) -> Diagnostic | None:
    """`attend(all, causal = True)`: a keyword in place of an argument's name."""
    keyword = failure.found
    if failure.bracket is None or keyword.type not in _KEYWORDS or failure.following.type != "EQUAL":
        return None
    hint = Hint(f"it is an item of the pattern: {_KEYWORDS[keyword.type]}")
    return Diagnostic(CODE, f"`{keyword}` is a keyword and no argument", token_span(keyword), hints=(hint,))


def keyword_bound(failure: Failure) -> Diagnostic | None:
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
