"""What a plan counts, as tables: keys and bytes of a decode step by length, FLOPs and bytes of a forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from rich.table import Table

from spdsl.ir.plan import Plan
from spdsl.passes.count import Count, Number, Shape, Step, shape_of
from spdsl.passes.published import published
from spdsl.passes.visible import DependsOnData
from spdsl.passes.work import Work, forward

LENGTHS = (8192, 16384, 32768, 65536)
FORWARD = 8192  # tokens of the forward pass
UNKNOWN = "depends on the data"


def tables(plan: Plan) -> tuple[Table, Table]:
    """Decode steps at LENGTHS, and the kernels of a forward pass at FORWARD tokens, in bf16."""
    shape = shape_of(plan.pattern)
    return _steps(plan, shape), _forward(plan, shape)


def _steps(plan: Plan, shape: Shape) -> Table:
    found = {length: _step(plan, length, shape) for length in LENGTHS}
    formulas = {length: published(plan, length) for length in LENGTHS}
    table = Table(title=f"one decode step, one layer: {_sizes(shape)}")
    for heading in ("length", "KV tokens", "of which", *_formula(any(formulas.values())), "KV bytes", "of dense"):
        table.add_column(heading, justify="left" if heading == "of which" else "right")
    for length, step in found.items():
        formula = [_plain(formulas[length])] if any(formulas.values()) else []
        table.add_row(f"{length:,}", *_cells(step, formula))
    return table


def _formula(known: bool) -> list[str]:
    return ["(s - l)/d + n l' + w"] if known else []


def _step(plan: Plan, length: int, shape: Shape) -> Step | None:
    try:
        return Count(plan, length, shape).step()
    except DependsOnData:
        return None


def _cells(step: Step | None, formula: list[str]) -> list[str]:
    if step is None:
        return [UNKNOWN, "", *formula, "", ""]
    parts = ", ".join(f"{read.softmax} {_number(read.keys)}" for read in step.reads)
    share = f"{'' if step.bytes.exact else '<= '}{step.bytes.value / step.dense_bytes:.1%}"
    return [_number(step.keys), parts, *formula, _number(step.bytes), share]


def _forward(plan: Plan, shape: Shape) -> Table:
    table = Table(title=f"forward pass of {FORWARD:,} tokens: {_sizes(shape)}")
    for heading in ("kernel", "FLOPs", "bytes, each tensor once"):
        table.add_column(heading, justify="left" if heading == "kernel" else "right")
    for row in _work(plan, shape):
        table.add_row(row.kernel, UNKNOWN if row.flops is None else _number(row.flops), f"{row.bytes:,}")
    return table


def _work(plan: Plan, shape: Shape) -> Iterator[Work]:
    try:
        yield from forward(Count(plan, FORWARD, shape))
    except DependsOnData:
        return


def _sizes(shape: Shape) -> str:
    dims = f"dim {shape.qk}" if shape.qk == shape.v else f"dims {shape.qk} and {shape.v}"
    return f"batch {shape.batch}, heads {shape.heads} and {shape.kv_heads}, {dims}, {shape.size} bytes an element"


def _number(number: Number) -> str:
    return f"{'' if number.exact else '<= '}{number.value:,}"


def _plain(number: Fraction | None) -> str:
    if number is None:
        return ""
    return f"{number.numerator:,}" if number.denominator == 1 else f"{float(number):,.2f}"
