"""mistakes: the diagnostic of a syntax error, which says what was probably meant."""

from __future__ import annotations

from lark import Token

from spdsl.diagnostics import Applicability, Diagnostic, Hint
from spdsl.syntax.build import token_span
from spdsl.syntax.failure import CODE, SPELLED, Failure, gap, shown
from spdsl.syntax.foreign_logic import condition_around, rewritten, sign_of
from spdsl.syntax.grammar import ALIEN
from spdsl.syntax.mistake_table import Mistake, signature, table
from spdsl.syntax.mistaken_ends import missing_operator, value_below, wrong_bracket
from spdsl.syntax.mistaken_names import hyphenated, keyword_bound, keyword_passed

_OPERANDS = frozenset({"NAME", "NUMBER", "LPAR"})


def diagnose(failure: Failure) -> Diagnostic:
    """The diagnostic of a syntax error."""
    special = (hyphenated, keyword_passed, keyword_bound, wrong_bracket, missing_operator, value_below, _other_logic)
    for told in special:
        diagnostic = told(failure)
        if diagnostic is not None:
            return diagnostic
    mistake = table().get(signature(failure))
    return _named(mistake, failure) if mistake else _plain(failure)


def unclosed_pattern(brace: Token) -> Diagnostic:
    hint = Hint("close the pattern with `}` in front of the next one or at the end")
    return Diagnostic(CODE, "a pattern is never closed", token_span(brace), "opened here", hints=(hint,))


def _other_logic(failure: Failure) -> Diagnostic | None:
    """`not`, `and`, `or` where more than the sign changes: they bind otherwise in the languages that have them."""
    mistake = table().get(signature(failure))
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


def _named(mistake: Mistake, failure: Failure) -> Diagnostic:
    span = gap(failure) if mistake.place == "gap" else token_span(failure.found)
    before = str(failure.previous or "")
    message = mistake.message.replace("{before}", before).replace("{found}", shown(failure.found))
    if mistake.replacement is None:
        hints = (Hint(mistake.hint),) if mistake.hint else ()
    else:
        hints = (Hint(mistake.hint, Applicability.MAYBE, span, mistake.replacement),)
    return Diagnostic(CODE, message, span, hints=hints)


def _plain(failure: Failure) -> Diagnostic:
    token = shown(failure.found)
    span = token_span(failure.found)
    if failure.found.type in ALIEN:
        return Diagnostic(CODE, f"{token} means nothing in this language", span)
    if failure.expected >= _OPERANDS:
        behind = f" after `{failure.previous}`" if failure.previous else ""
        return Diagnostic(CODE, f"a value is missing{behind}", gap(failure), f"found {token}")
    wanted = sorted(SPELLED[kind] for kind in failure.expected if kind in SPELLED)
    label = f"expected {', '.join(wanted[:-1])} or {wanted[-1]}" if len(wanted) > 1 else f"expected {''.join(wanted)}"
    return Diagnostic(CODE, f"unexpected {token}", span, label)
