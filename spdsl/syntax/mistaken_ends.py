"""mistaken_ends: syntax errors where an expression or a bracket should have ended, or had something in it."""

from __future__ import annotations

from spdsl.diagnostics import Applicability, Diagnostic, Hint, Span
from spdsl.syntax.build import token_span
from spdsl.syntax.failure import CODE, Failure, gap
from spdsl.syntax.grammar import ALIEN, END

_CLOSING = {"(": ")", "[": "]"}
_ENDS_ITEM = frozenset({"RBRACE", "RETURN", "PATTERN", "PARAM", "CAUSAL", END})


def missing_operator(failure: Failure) -> Diagnostic | None:
    """`x = a b`: the grammar takes `b` for the next item, and fails behind it."""
    alien = failure.found.type in ALIEN
    if alien or not failure.joined or failure.previous is None or failure.expected != {"EQUAL", "LPAR"}:
        return None
    hint = Hint("an operator is missing, or the next item belongs on a line of its own")
    message = f"`{failure.previous}` follows a complete expression"
    return Diagnostic(CODE, message, token_span(failure.previous), hints=(hint,))


def value_below(failure: Failure) -> Diagnostic | None:
    """`x =` with nothing behind it: the name of the next item was taken for its value."""
    before, value = failure.earlier, failure.previous
    if failure.found.type != "EQUAL" or failure.bracket or not before or not value or before.line == value.line:
        return None
    if value.type != "NAME":
        return None
    end = token_span(before).end
    hint = Hint("write a name, a number or a call")
    return Diagnostic(CODE, f"a value is missing after `{before}`", Span(end, end), hints=(hint,))


def wrong_bracket(failure: Failure) -> Diagnostic | None:
    """A bracket that is not closed, or closed by one of the other kind."""
    bracket = failure.bracket
    if bracket is None:
        return None
    closing = _CLOSING[str(bracket)]
    closed_by = failure.found
    if closed_by.type in ("RPAR", "RSQB") and str(closed_by) != closing:
        span = token_span(closed_by)
        hint = Hint(f"write `{closing}`", Applicability.MAYBE, span, closing)
        return Diagnostic(
            CODE, f"`{bracket}` is closed by `{closed_by}`", span, f"`{closing}` is expected", hints=(hint,)
        )
    if not failure.opens_line and closed_by.type not in _ENDS_ITEM:
        return None
    place = gap(failure)
    hint = Hint(f"add `{closing}`", Applicability.MAYBE, place, closing)
    return Diagnostic(CODE, f"`{bracket}` is never closed", token_span(bracket), "opened here", hints=(hint,))
