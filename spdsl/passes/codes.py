"""codes: the codes of warnings as arguments, `W501`."""

from __future__ import annotations

from spdsl.catalogue import entries
from spdsl.diagnostics import did_you_mean
from spdsl.passes.names import Names
from spdsl.syntax import tree


def warnings() -> tuple[str, ...]:
    """The codes that can be allowed."""
    return tuple(code for code in entries() if code.startswith("W"))


def code(names: Names, expr: tree.Expr) -> str | None:
    """The code of a warning; None after an error."""
    text = expr.text if isinstance(expr, tree.Name) else None
    if text in warnings():
        return text
    if text in entries():
        names.report.error(
            "E202", f"`{text}` is an error", expr.span, "only warnings can be allowed",
            note=f"{text}: {entries()[text].title}",
        )  # fmt: skip
        return None
    hint = did_you_mean(text, warnings(), expr.span) if text else None
    names.report.error(
        "E202", f"`{text}` is no code of a warning" if text else "the code of a warning is expected here", expr.span,
        "not one of them", hint=hint or "the codes are in docs/errors.md",
    )  # fmt: skip
    return None
