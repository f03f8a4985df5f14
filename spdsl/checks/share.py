"""share: lists for each query head where several heads read the same keys.

A decode step loads what any head of the group chose. With lists that do not depend on each other the expected number of
units is m (1 - (1 - n/m)^g), of m units, n on each of g lists; lists that agree need fewer.
"""

from __future__ import annotations

from collections.abc import Iterator

from spdsl.checks.view import View, warning
from spdsl.diagnostics import Applicability, Diagnostic, Hint
from spdsl.ir.pattern import Choice
from spdsl.passes.source_numbers import argument


def union(chosen: int, units: int, lists: int) -> float:
    """Expected size of the union of independent random choices of `chosen` out of `units`."""
    return units * (1 - (1 - min(chosen, units) / units) ** lists)


def share(view: View) -> Iterator[Diagnostic]:
    told: set[Choice] = set()
    for softmax in view.plan.softmaxes:
        choice, heads = softmax.units, view.query_heads(softmax.softmax)
        kv_heads = view.kv_heads(softmax.sweeps[0].stream)
        if choice is None or choice in told or choice.share != "head" or not heads or not kv_heads:
            continue
        group, n, m = heads // kv_heads, choice.capacity, view.units(choice)
        if group < 2 or n is None:
            continue
        told.add(choice)
        most = union(n, m, group)
        written = argument(view.tree, choice.span, "share")
        by_group = "group" if choice.score is None or choice.score.probability else "max(group)"
        text = f"`share = {by_group}` chooses once for the {group} heads"
        hint = Hint(text, Applicability.MAYBE, written.place, by_group) if written else Hint(text)
        yield warning(
            "W505",
            f"each of {group} query heads chooses {n} units of a kv head, which loads up to {most:,.4g} of them at a "
            f"decode step: {most / min(n, m):.3g} times a shared list",
            written.place if written else choice.span,
            f"{heads} query heads, {kv_heads} kv heads",
            f"expected for independent choices of {n} out of {m:,} units {view.at_length}; heads that agree need fewer",
            hints=(hint,),
        )
