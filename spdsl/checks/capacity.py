"""capacity: lists that are longer than one kernel ranks, have no bound, or hold everything there is."""

from __future__ import annotations

from collections.abc import Iterator

import sympy

from spdsl.checks.view import View, warning
from spdsl.diagnostics import Applicability, Diagnostic, Hint, Span
from spdsl.ir.pattern import Choice, Phase
from spdsl.ir.rule import TopK
from spdsl.ir.symbols import LENGTH
from spdsl.passes.selection import MOST_RANKED
from spdsl.passes.source_numbers import Written, argument

INDEX_BYTES = 4  # int32


def scores_in_memory(view: View) -> Iterator[Diagnostic]:
    """Lists of more units than a kernel keeps in registers."""
    for choice in _selected(view):
        n = choice.capacity
        if n is None or n <= MOST_RANKED or choice.rows > 1:
            continue
        written = argument(view.tree, choice.span, "k" if isinstance(choice.rule, TopK) else "most")
        message = (
            f"lists of {n} units are longer than the {MOST_RANKED} that a kernel ranks: all scores go through memory"
        )
        place = written.place if written else choice.span
        label = "more than a kernel keeps in registers"
        yield warning("W508", message, place, label, _in_memory(view, choice), hints=(_fewer(written, n),))


def _fewer(written: Written | None, n: int) -> Hint:
    text = f"a kernel ranks up to {MOST_RANKED}; larger units need fewer"
    return written.hint(text, n, MOST_RANKED, Applicability.MAYBE) if written else Hint(text)


def unbounded(view: View) -> Iterator[Diagnostic]:
    """Thresholds without `most`: lists as long as there are units."""
    for choice in _selected(view):
        if choice.capacity is not None or choice.span is None:
            continue
        units, lists = view.units(choice), _lists(view, choice)
        rows, of = (-(-view.length // choice.rows), "tiles") if choice.tiled else (view.length, "queries")
        room = view.expected.batch * lists * rows * units * INDEX_BYTES
        end = Span(choice.span.end - 1, choice.span.end - 1)
        yield warning(
            "W509",
            f"the lists of `{choice.name}` have room for every unit: {room / 2**30:,.3g} GiB of numbers",
            choice.span,
            "no bound",
            f"{view.expected.batch} x {lists} lists x {rows:,} {of} x {units:,} units x {INDEX_BYTES} bytes, "
            f"{view.at_length}",
            _in_memory(view, choice),
            hints=(Hint("bound them, by fewer if you can", Applicability.MAYBE, end, f", most = {MOST_RANKED}"),),
        )  # fmt: skip


def whole_budget(view: View) -> Iterator[Diagnostic]:
    """Choices that take all units of the declared length."""
    length = view.expected.length
    for choice in _selected(view) if length else ():
        n, units = choice.capacity, view.units(choice)
        if n is not None and n >= units and _used(view, choice):
            yield warning(
                "W513",
                f"`{choice.name}` chooses {n} of {units} units at {length:,} tokens: all of them",
                choice.span,
                "leaves nothing out",
                "scores and lists cost time, and the softmax is dense at the price of one over units",
                hints=(Hint(f"choose fewer than {units}, or declare the length that the pattern is for"),),
            )


def _selected(view: View) -> list[Choice]:
    return [plan.choice for plan in view.plan.choices]


def _used(view: View, choice: Choice) -> bool:
    """Whether a result that may answer at the length needs it."""
    pattern, length = view.plan.pattern, {LENGTH: sympy.Integer(view.length)}
    for phase in Phase:
        for case in pattern.cases_of(phase):
            holds = sympy.true if case.condition is None else case.condition.xreplace(length)
            if holds is not sympy.false and choice in pattern.steps(case):
                return True
            if holds is sympy.true:
                break
    return False


def _lists(view: View, choice: Choice) -> int:
    return view.shape.heads if choice.share == "head" else view.shape.kv_heads


def _in_memory(view: View, choice: Choice) -> str:
    """What the kernel that ranks does not write."""
    rows = -(-view.length // choice.rows)
    scores = view.expected.batch * _lists(view, choice) * rows * view.units(choice)
    return f"{scores:.3g} scores are written, and read to cut the lists, {view.at_length}"
