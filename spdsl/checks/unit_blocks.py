"""unit_blocks: units that a kernel has to walk in smaller blocks than it could.

A block of keys is a power of two that divides the unit. A unit of 48 tokens is walked in three blocks of 16, one of 64
in one block: each block is a step of the loop with its own products, loads and softmax.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import lcm

from spdsl.checks.kernels import unit_config
from spdsl.checks.view import View, warning
from spdsl.diagnostics import Applicability, Diagnostic, Hint
from spdsl.ir.pattern import LEAST_BLOCK, Choice, Stream
from spdsl.passes.source_numbers import Written, argument
from spdsl.primitives.grains import nearest

KERNELS = ("units", "units_dq", "units_dkdv", "units_decode")
ANY_UNIT = 1 << 30


def unit_blocks(view: View) -> Iterator[Diagnostic]:
    told = set()
    for softmax in view.plan.softmaxes:
        choice = softmax.units
        if choice is None or choice.gathered or choice in told:
            continue
        told.add(choice)
        tuned = max(unit_config(view, kernel, softmax, ANY_UNIT).config.block_n for kernel in KERNELS)
        best = min(tuned, 1 << (choice.unit.bit_length() - 1))
        block = min(tuned, choice.unit & -choice.unit)
        if block >= best:
            continue
        written, applicability = _unit(view, choice)
        near = nearest(choice.unit, lcm(best, _stride(view, choice)))
        step = min(tuned, near & -near)
        hint = f"the nearest unit of whole blocks is {near}"
        yield warning(
            "W502",
            f"units of {choice.unit} tokens are walked in blocks of {block}: {choice.unit // block} steps for each, "
            f"where {near} tokens take {near // step}",
            written.place if written else choice.span,
            f"{block} is the largest power of two in it",
            f"the kernels take blocks of up to {tuned} keys; a block lies in one unit",
            hints=(written.hint(hint, choice.unit, near, applicability) if written else Hint(hint),),
        )


def _unit(view: View, choice: Choice) -> tuple[Written | None, Applicability]:
    """Where the unit is written: in the choice, or it is the stride of the entries that it picks."""
    own = argument(view.tree, choice.span, "unit")
    if own is not None or choice.given:
        return own, Applicability.MACHINE
    cells = _scored(view, choice).span
    return argument(view.tree, cells, "stride") or argument(view.tree, cells, "width"), Applicability.MAYBE


def _stride(view: View, choice: Choice) -> int:
    """What a unit must be a multiple of, whichever it is."""
    scored = choice.selected and argument(view.tree, choice.span, "unit") is not None
    stride = choice.score.grain.grid(_scored(view, choice).grid).stride if scored and choice.score else 1
    return lcm(stride, LEAST_BLOCK)


def _scored(view: View, choice: Choice) -> Stream:
    assert choice.score is not None
    stream = view.plan.pattern.input(choice.score.grain.stream)
    assert isinstance(stream, Stream)
    return stream
