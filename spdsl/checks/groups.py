"""groups: rows of the matrix products that stay empty, as the heads of a list are no power of two.

Rows of a tile over units are queries times the heads that share a list, padded to a power of two. Forward, backward and
selection are bound by their products there, so the padding costs its share of the time. At decode it does not: 16 rows
of a product on each key need fewer FLOPs than a GPU does while it loads the key.
"""

from __future__ import annotations

from collections.abc import Iterator

from spdsl.checks.kernels import heads_per_list, steps_of
from spdsl.checks.view import View, warning
from spdsl.diagnostics import Applicability, Diagnostic, Hint
from spdsl.ir.schedule import Stage
from spdsl.passes.source_numbers import Written, declared
from spdsl.runtime.tuning.configs import power_of_2

LEAST_WASTE = 1 / 8  # below it the share is lost in what the tables, found without a timed GPU, leave open


def groups(view: View) -> Iterator[Diagnostic]:
    pattern = view.plan.pattern
    written = declared(view.tree, "heads", "kv")
    for softmax in view.plan.softmaxes:
        choice, heads = softmax.units, view.query_heads(softmax.softmax)
        if choice is None or choice.share != "group" or not heads or not pattern.kv_heads or written is None:
            continue
        group = heads_per_list(view, choice, softmax.softmax)
        padded = power_of_2(group)
        if 1 - group / padded < LEAST_WASTE or {stage for stage, _ in steps_of(view, softmax)} == {Stage.DECODE}:
            continue
        yield warning(
            "W501",
            f"{group} query heads share a list, in tiles with room for {padded}: "
            f"{1 - group / padded:.1%} of the rows are empty",
            written.place,
            f"{heads} / {pattern.kv_heads} = {group} heads each",
            f"it costs `{softmax.name}` that share of the time in training and prefill; decode is bound by its loads",
            hints=tuple(_hints(written, heads, pattern.kv_heads)),
        )
        return


def _hints(written: Written, heads: int, kv_heads: int) -> Iterator[Hint]:
    """The nearest numbers of kv heads below and above whose groups are powers of two."""
    good = [n for n in range(1, heads + 1) if heads % n == 0 and power_of_2(heads // n) == heads // n]
    nearest = (max((n for n in good if n < kv_heads), default=None), min(n for n in good if n > kv_heads))
    for n in nearest:
        if n is not None:
            yield written.hint(f"`kv = {n}` has groups of {heads // n}", kv_heads, n, Applicability.MAYBE)
