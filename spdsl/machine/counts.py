"""What a plan costs by the cost model, as tables: a decode step by length, the steps of a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

from rich.text import Text

from spdsl.budget import TooMuch, at_most
from spdsl.cost.kernels import USUAL, Call
from spdsl.cost.machine import machine_of
from spdsl.cost.phases import kernel, started
from spdsl.cost.reads import StepReads, step_reads
from spdsl.cost.report import sizes
from spdsl.ir.plan import Plan
from spdsl.ir.schedule import Buffer, Stage
from spdsl.passes.count import Count, Number, Shape, shape_of
from spdsl.passes.schedule import schedule, stages
from spdsl.passes.visible import DependsOnData
from spdsl.tables import Column, Fitted
from spdsl.targets import USUAL as USUAL_TARGET
from spdsl.targets import find

LENGTHS = (8192, 16384, 32768, 65536)
FORWARD = 8192  # tokens of the forward pass
LINE = 128  # bytes that memory moves at once
MOST_STEPS = 4_000_000  # of all tables together: up to half a minute
UNKNOWN = "depends on the data"
UNCOUNTED = "too much to count"
Counted = TypeVar("Counted")


def tables(plan: Plan) -> tuple[Fitted, Fitted]:
    """Decode steps at LENGTHS, and the steps of a forward pass at FORWARD tokens, in bf16.

    Below them the lists that may overflow.
    """
    shape = shape_of(plan.pattern)
    with at_most(MOST_STEPS):
        found = _steps(plan, shape), _forward(plan, shape)
    found[1].notes += [Text(f"{one.name}, {one.capacity}: {one.overflow}") for one in _bounded(plan)]
    return found


def _bounded(plan: Plan) -> list[Buffer]:
    """The buffers whose bound may leave something out."""
    steps = [step for stage in stages(plan) for step in schedule(plan, stage).steps]
    return list({one.name: one for step in steps for one in step.writes if one.overflow}.values())


def gathered(plan: Plan) -> Iterator[str]:
    """What is told of softmaxes whose keys are loaded one by one: bytes as memory moves them, in whole lines."""
    shape = shape_of(plan.pattern)
    for softmax in plan.softmaxes:
        choice = softmax.units
        if choice is None or not choice.gathered:
            continue
        _, qk, v = Count(plan, FORWARD, shape).stream(softmax.sweeps[0].stream)
        rows = [dim * shape.size for dim in (qk, v) if dim]
        own, moved = sum(rows), sum(-(-row // LINE) * LINE for row in rows)
        more = "" if moved == own else f" ({moved:,} in lines of {LINE})"
        yield (
            f"{softmax.name}: no block lies in units of {choice.unit} in `{choice.name}`, so keys are gathered row by "
            f"row, {own:,} bytes each{more}; dk and dv go over whole units of {choice.whole_unit}"
        )


def _steps(plan: Plan, shape: Shape) -> Fitted:
    table = Fitted(f"one decode step, one layer: {sizes(shape)}", _columns())
    for length in LENGTHS:
        table.add_row(f"{length:,}", *_cells(_known(partial(step_reads, plan, length, shape))))
    return table


def _known(count: Callable[[], Counted]) -> Counted | str:
    """What `count` finds, or why it finds nothing."""
    try:
        return count()
    except DependsOnData:
        return UNKNOWN
    except TooMuch:
        return UNCOUNTED


def _columns() -> list[Column]:
    return [
        Column("tokens", "in the cache"),
        Column("KV tokens", "keys and values that the step reads"),
        Column("of which", words=True),
        Column("KV bytes"),
        Column("of dense", "share of what dense attention reads"),
    ]


def _cells(step: StepReads | str) -> list[str]:
    if isinstance(step, str):
        return [step, "", "", ""]
    parts = ", ".join(f"{read.softmax} {_number(read.keys)}" for read in step.reads)
    share = f"{'' if step.bytes.exact else '<= '}{step.bytes.value / step.dense_bytes:.1%}"
    return [_number(step.keys), parts, _number(step.bytes), share]


def _forward(plan: Plan, shape: Shape) -> Fitted:
    """The steps that move bytes; FLOPs of the visible pairs."""
    columns = (Column("step", words=True), Column("FLOPs"), Column("bytes, each tensor once"))
    table = Fitted(f"forward pass of {FORWARD:,} tokens: {sizes(shape)}", columns)
    call = Call(plan, Stage.FORWARD, FORWARD, shape, machine_of(find(USUAL_TARGET)), USUAL)
    for row in _rows(call):
        table.add_row(*row)
    return table


def _rows(call: Call) -> list[tuple[str, str, str]]:
    found: list[tuple[str, str, str]] = []
    steps = _known(lambda: list(started(call)))
    if isinstance(steps, str):
        return [(steps, "", "")]
    for step in steps:
        own = _known(partial(kernel, call, step))
        if own == UNCOUNTED:
            return [*found, (UNCOUNTED, "", "")]
        if isinstance(own, str):
            found.append((step.name, own, ""))
        elif own.flops.value or own.bytes.value:
            found.append((own.name, _number(own.flops), _number(own.bytes)))
    return found


def _number(number: Number) -> str:
    return f"{'' if number.exact else '<= '}{number.value:,}"
