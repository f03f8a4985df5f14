"""expression_limits: whether sympy can go on with an expression, or it is longer, deeper or more exact than is kept."""

from __future__ import annotations

from spdsl.budget import spend
from spdsl.diagnostics import Span
from spdsl.ir import extent
from spdsl.ir.symbols import Expr
from spdsl.limits import EXACT_DIGITS, EXPANDED_TERMS, EXPRESSION_SIZE, NESTED
from spdsl.passes.names import Names

STEPS = 10  # for each level of nesting, where digits and terms are counted


def within_limits(names: Names, value: Expr, span: Span) -> bool:
    """Whether sympy can go on with a value; an error if it is too long."""
    size = extent.size(value, EXPRESSION_SIZE)
    spend(size)
    if size > EXPRESSION_SIZE:
        names.report.error(
            "E307", f"the expression has more than {EXPRESSION_SIZE} operators and operands", span,
            "too complex, with its names written out", hint="compute it outside and pass it as a `tensor`",
        )  # fmt: skip
        return False
    depth = extent.nesting(value)
    if depth > NESTED:
        names.report.error(
            "E307", f"functions and reads (two each) stand {depth} deep inside one another, at most {NESTED}", span,
            "nested too deeply", hint="compute it outside and pass it as a `tensor`",
        )  # fmt: skip
        return False
    spend(STEPS * depth)
    digits = extent.digits(value)
    if digits > EXACT_DIGITS:
        names.report.error(
            "E006", f"the exact value takes {digits} digits, at most {EXACT_DIGITS} are kept", span, "too many digits",
            hint="round it: `x // 1`",
        )  # fmt: skip
        return False
    terms = extent.terms(value)
    if terms > EXPANDED_TERMS:
        count = f"{terms:,}" if terms < extent.FAR else f"{extent.FAR:,} or more"
        names.report.error(
            "E307", f"the expression has {count} terms when it is multiplied out, at most {EXPANDED_TERMS}", span,
            "too complex", hint="compute it outside and pass it as a `tensor`",
        )  # fmt: skip
        return False
    return True
