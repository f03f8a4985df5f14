"""foreign_logic: a condition with the `and`, `or` and `not` of other languages, as it is written here.

There they bind looser than comparisons and than `|` and `&`; here `~` binds tighter than all other operators, and `&`
tighter than `|`. So an operand may need brackets.
"""

from __future__ import annotations

from collections.abc import Sequence

from lark import Token

from spdsl.syntax.grammar import ALIEN

MOST_TOKENS = 200  # of a condition that is written anew; for a longer one the sign alone has to do

# `!` binds tighter elsewhere, too, but what it stands before here is a condition, never a number.
_SIGNS = {"and": "&", "&&": "&", "or": "|", "||": "|", "not": "~", "!": "~"}
_OPENING = frozenset({"LPAR", "LSQB"})
_CLOSING = frozenset({"RPAR", "RSQB"})
_OPERAND_ENDS = _CLOSING | {"NAME", "NUMBER"}
_LOOSE = frozenset({"VBAR", "AMPERSAND"})
_BINARY = frozenset({"VBAR", "AMPERSAND", "COMPARE", "PLUS", "MINUS", "MUL"})


def sign_of(token: Token) -> str | None:
    """`&`, `|` or `~` for the word that other languages have for it."""
    return _SIGNS.get(str(token)) if token.type in ALIEN else None


def condition_around(tokens: Sequence[Token], at: int) -> Sequence[Token]:
    """The condition that holds the token `at`, up to the brackets, commas and ends of items around it."""
    first, depth = at, 0
    while first and (depth or _inside(tokens[first - 1], _CLOSING)):
        first -= 1
        depth += _turn(tokens[first], _CLOSING, _OPENING)
    end, depth = at + 1, 0
    while end < len(tokens) and (depth or (_inside(tokens[end], _OPENING) and not _begins_anew(tokens, end))):
        depth += _turn(tokens[end], _OPENING, _CLOSING)
        end += 1
    return tokens[first:end]


def _turn(token: Token, inwards: frozenset[str], outwards: frozenset[str]) -> int:
    return (token.type in inwards) - (token.type in outwards)


def _inside(token: Token, brackets: frozenset[str]) -> bool:
    """Whether a token may stand in a condition, outside of its `brackets`."""
    return token.type in _BINARY | brackets | {"NAME", "NUMBER", "TILDE"} or sign_of(token) is not None


def _begins_anew(tokens: Sequence[Token], at: int) -> bool:
    """Whether the condition is complete in front of a token, which then belongs to the next item."""
    starts = tokens[at].type in ("NAME", "NUMBER", "TILDE") or sign_of(tokens[at]) == "~"
    return starts and tokens[at - 1].type in _OPERAND_ENDS


def rewritten(tokens: Sequence[Token]) -> str | None:
    """The condition in the signs of this language; None if it is too long for that."""
    return _either(tokens) if 0 < len(tokens) <= MOST_TOKENS else None


def _either(tokens: Sequence[Token]) -> str:
    return " | ".join(_both(part) for part in _split(tokens, "|"))


def _both(tokens: Sequence[Token]) -> str:
    parts = _split(tokens, "&")
    return " & ".join(_operand(part, alone=len(parts) == 1) for part in parts)


def _operand(tokens: Sequence[Token], alone: bool) -> str:
    negations = 0
    while negations < len(tokens) and sign_of(tokens[negations]) == "~":
        negations += 1
    inner = tokens[negations:]
    outside = {token.type for token, depth in _depths(inner) if not depth}
    if negations and str(tokens[negations - 1]) == "!" and outside & _LOOSE:  # binds tighter than `&` and `|`
        cut = next(i for i, (token, depth) in enumerate(_depths(inner)) if not depth and token.type in _LOOSE)
        first = _operand(tokens[: negations + cut], alone=False)
        text = f"{first} {inner[cut]} {_operand(inner[cut + 1 :], alone=True)}"
        return text if alone or "VBAR" not in outside else f"({text})"
    loose = outside & _BINARY if negations else outside & {"VBAR"} and not alone
    return "~" * negations + (f"({_words(inner)})" if loose else _words(inner))


def _split(tokens: Sequence[Token], sign: str) -> list[Sequence[Token]]:
    """The parts between the words for `sign`, outside of brackets."""
    cuts = [i for i, (token, depth) in enumerate(_depths(tokens)) if not depth and sign_of(token) == sign]
    return [tokens[begin:end] for begin, end in zip([0, *(cut + 1 for cut in cuts)], [*cuts, len(tokens)], strict=True)]


def _depths(tokens: Sequence[Token]) -> list[tuple[Token, int]]:
    """Each token with the brackets that are open around it; brackets themselves stand outside."""
    depth, with_depths = 0, list[tuple[Token, int]]()
    for token in tokens:
        depth -= token.type in _CLOSING
        with_depths.append((token, depth))
        depth += token.type in _OPENING
    return with_depths


def _words(tokens: Sequence[Token]) -> str:
    """An operand as it stands, with what its brackets hold written anew."""
    text, at = "", 0
    while at < len(tokens):
        token = tokens[at]
        gap = at > 0 and (tokens[at - 1].end_pos or 0) < (token.start_pos or 0)
        text += (" " if gap else "") + str(token)
        at += 1
        if token.type in _OPENING:
            end = at + next((i for i, (_, depth) in enumerate(_depths(tokens[at:])) if depth < 0), len(tokens) - at)
            text += _listed(tokens[at:end])
            at = end
    return text


def _listed(tokens: Sequence[Token]) -> str:
    """Arguments, or what else stands in brackets."""
    commas = [i for i, (token, depth) in enumerate(_depths(tokens)) if not depth and token.type == "COMMA"]
    parts = zip([0, *(comma + 1 for comma in commas)], [*commas, len(tokens)], strict=True)
    return ", ".join(_argument(tokens[begin:end]) for begin, end in parts)


def _argument(tokens: Sequence[Token]) -> str:
    """`name = condition`, or a condition."""
    if len(tokens) > 1 and tokens[1].type == "EQUAL":
        return f"{tokens[0]} = {_either(tokens[2:])}"
    return _either(tokens)
