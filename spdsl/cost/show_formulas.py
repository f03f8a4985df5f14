"""show_formulas: the counts of the kernels of a stage as formulas, line by line for people."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import sympy

from spdsl.cost.formulas import STARTS, Formula, formula
from spdsl.cost.interpolate import period
from spdsl.cost.kernels import Kernel, Options
from spdsl.cost.machine import machine_of
from spdsl.cost.parameter_formulas import ParameterFormula, parameter_formula
from spdsl.cost.phases import Stage, kernels
from spdsl.ir.plan import Plan
from spdsl.passes.count import Shape
from spdsl.targets import Target

B = sympy.Symbol("B", integer=True, positive=True)
_LABELS = {"flops": "FLOPs", "machine": "FLOPs of the machine", "moved": "bytes"}
_USUAL = STARTS[2]  # tokens: which kernels there are
_LEAST = 1024  # tokens


@dataclass(frozen=True, slots=True)
class Varied:
    """A parameter, its value, and the plan for others; None for a value that the pattern refuses."""

    name: str
    value: int
    plan: Callable[[int], Plan | None]


def show_formulas(
    plan: Plan, stage: Stage, shape: Shape, target: Target, options: Options, varied: Varied | None = None
) -> Iterator[str]:
    """Each kernel with its launches, FLOPs, FLOPs of the machine and bytes, of N or of N and a parameter."""

    @cache
    def known(length: int, batch: int = 1, value: int | None = None) -> list[Kernel] | None:
        own = plan if value is None or varied is None else varied.plan(value)
        if own is None:
            return None
        return kernels(own, stage, length, replace(shape, batch=batch), machine_of(target), options)

    sizes = f"heads {shape.heads} and {shape.kv_heads}, dims {shape.qk} and {shape.v}"
    yield f"{plan.pattern.name}, {stage.value} on {target.name}, {sizes}; batch B of N tokens"
    once, twice = known(_USUAL), known(_USUAL, 2)
    assert once is not None
    assert twice is not None
    walked = (softmax.units for softmax in plan.softmaxes if softmax.units is not None)
    choices = [*(choice_plan.choice for choice_plan in plan.choices), *walked]
    units = sorted({choice.unit for choice in choices} | {_stride(plan)})
    whole = period(plan, shape, target)
    for i, (own, double) in enumerate(zip(once, twice, strict=True)):
        yield f"  {own.name}: {own.launches} launches, {own.operators} operators of torch"
        for field, label in _LABELS.items():
            count = _counted(known, own.name, i, field)
            fitted = _of_length(count, units, whole) if varied is None else _of_both(count, varied, whole)
            if fitted is None:
                yield f"    {label} = no polynomial of {_variables(varied)}"
            elif fitted.expression != 0:
                sign = "=" if getattr(own, field).exact else "<="
                of_batch = getattr(double, field).value == 2 * getattr(own, field).value
                expression = sympy.sstr(B * fitted.expression if of_batch else fitted.expression)
                yield f"    {label} {sign} {expression}    ({_holds(fitted, varied)}{'' if of_batch else ', B = 1'})"


def _of_length(count: Callable[..., int | None], units: list[int], whole: int) -> Formula | None:
    return formula(lambda length: count(length) or 0, units, whole, _LEAST)


def _of_both(count: Callable[..., int | None], varied: Varied, whole: int) -> ParameterFormula | None:
    return parameter_formula(count, sympy.Symbol(varied.name, integer=True), varied.value, whole)


def _variables(varied: Varied | None) -> str:
    return "N" if varied is None else f"N and {varied.name}"


def _holds(fitted: Formula | ParameterFormula, varied: Varied | None) -> str:
    lengths = (
        f"multiples of {fitted.modulus:,} from {fitted.start:,}" if fitted.modulus > 1 else f"N >= {fitted.start:,}"
    )
    if isinstance(fitted, Formula) or varied is None:
        return lengths
    values = f"{fitted.first:,}, {fitted.first + fitted.step:,}, {fitted.first + 2 * fitted.step:,}, ... < N / 4"
    return f"N: {lengths}; {varied.name}: {values}"


def _counted(known: Callable[..., list[Kernel] | None], name: str, i: int, field: str) -> Callable[..., int | None]:
    def count(length: int, value: int | None = None) -> int | None:
        started = known(length, 1, value)
        if started is None:
            return None
        own = next((kernel for kernel in started[i:] if kernel.name == name), None)
        return int(getattr(own, field).value) if own is not None else -1

    return count


def _stride(plan: Plan) -> int:
    return max([sweep.stream.grid.stride for softmax in plan.softmaxes for sweep in softmax.sweeps], default=1)
