"""What a plan counts, as tables: keys and bytes of a decode step by length, FLOPs and bytes of a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import TypeVar

from spdsl.budget import TooMuch, at_most
from spdsl.cost.report import sizes
from spdsl.ir.plan import Plan
from spdsl.passes.count import Count, Number, Shape, Step, shape_of
from spdsl.passes.published import published
from spdsl.passes.visible import DependsOnData
from spdsl.passes.work import forward
from spdsl.tables import Column, Fitted

LENGTHS = (8192, 16384, 32768, 65536)
FORWARD = 8192  # tokens of the forward pass
MOST_STEPS = 4_000_000  # of all tables together: up to half a minute
UNKNOWN = "depends on the data"
UNCOUNTED = "too much to count"
Counted = TypeVar("Counted")


def tables(plan: Plan) -> tuple[Fitted, Fitted]:
    """Decode steps at LENGTHS, and the kernels of a forward pass at FORWARD tokens, in bf16."""
    shape = shape_of(plan.pattern)
    with at_most(MOST_STEPS):
        return _steps(plan, shape), _forward(plan, shape)


def _steps(plan: Plan, shape: Shape) -> Fitted:
    found = {length: _known(Count(plan, length, shape).step) for length in LENGTHS}
    formulas = {length: _known(partial(published, plan, length)) for length in LENGTHS}
    shown = any(isinstance(formula, Fraction) for formula in formulas.values())
    table = Fitted(f"one decode step, one layer: {sizes(shape)}", _columns(shown))
    for length, step in found.items():
        formula = [_plain(formulas[length])] if shown else []
        table.add_row(f"{length:,}", *_cells(step, formula))
    return table


def _known(count: Callable[[], Counted]) -> Counted | str:
    """What `count` finds, or why it finds nothing."""
    try:
        return count()
    except DependsOnData:
        return UNKNOWN
    except TooMuch:
        return UNCOUNTED


def _columns(formula: bool) -> list[Column]:
    published = [Column("(s - l)/d + n l' + w", "the published count of those tokens", spare=1)]
    return [
        Column("tokens", "in the cache"),
        Column("KV tokens", "keys and values that the step reads"),
        Column("of which", words=True),
        *(published if formula else []),
        Column("KV bytes"),
        Column("of dense", "share of what dense attention reads"),
    ]


def _cells(step: Step | str, formula: list[str]) -> list[str]:
    if isinstance(step, str):
        return [step, "", *formula, "", ""]
    parts = ", ".join(f"{read.softmax} {_number(read.keys)}" for read in step.reads)
    share = f"{'' if step.bytes.exact else '<= '}{step.bytes.value / step.dense_bytes:.1%}"
    return [_number(step.keys), parts, *formula, _number(step.bytes), share]


def _forward(plan: Plan, shape: Shape) -> Fitted:
    columns = (Column("kernel", words=True), Column("FLOPs"), Column("bytes, each tensor once"))
    table = Fitted(f"forward pass of {FORWARD:,} tokens: {sizes(shape)}", columns)
    works = _known(lambda: forward(Count(plan, FORWARD, shape)))
    if isinstance(works, str):
        table.add_row(works, "", "")
        return table
    for row in works:
        table.add_row(row.kernel, UNKNOWN if row.flops is None else _number(row.flops), f"{row.bytes:,}")
    return table


def _number(number: Number) -> str:
    return f"{'' if number.exact else '<= '}{number.value:,}"


def _plain(number: Fraction | str | None) -> str:
    if not isinstance(number, Fraction):
        return number or ""
    return f"{number.numerator:,}" if number.denominator == 1 else f"{float(number):,.2f}"
