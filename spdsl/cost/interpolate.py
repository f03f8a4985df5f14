"""interpolate: the kernels of a length from those of others, where their counts follow one polynomial.

Lengths that differ by whole periods (units, strides, tiles) have counts that are polynomials of degree two of the
length once it is past every window. If the counts of four
known lengths lie on one exactly, those of a length between them do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from math import lcm
from typing import Any

from spdsl.cost.kernels import Kernel, count_of
from spdsl.ir.plan import Plan
from spdsl.passes.count import Number, Shape
from spdsl.passes.visible import DependsOnData, Visible
from spdsl.runtime.tuning.configs import tables_for
from spdsl.runtime.tuning.unit_configs import UNIT_TABLES
from spdsl.targets import Target

_COUNTS = ("flops", "machine", "exps", "bytes", "moved")
_DEGREE = 2


def period(plan: Plan, shape: Shape, target: Target) -> int:
    """After how many tokens the counts repeat their form."""
    tokens = lcm(*_units(plan, shape))
    for tables in (tables_for(target.architecture), tables_for(target.architecture, UNIT_TABLES)):
        for table in tables.values():
            tokens = lcm(tokens, *(block for config in table.values() for block in (config.block_m, config.block_n)))
    strides = [sweep.stream.grid.stride for softmax in plan.softmaxes for sweep in softmax.sweeps]
    return tokens * max([1, *strides])


def _units(plan: Plan, shape: Shape) -> list[int]:
    count, units = count_of(plan, 1, shape), [1]
    units += [choice.choice.whole_unit for choice in plan.choices]
    for softmax in count.plan.softmaxes:
        units += [softmax.units.whole_unit] if softmax.units is not None else []
        units += [sweep.stream.grid.stride for sweep in softmax.sweeps] + [softmax.step]
        for sweep in softmax.sweeps:
            try:
                units += list(Visible(sweep.test, 1).units())
            except DependsOnData:
                continue
    return units


def interpolate(known: Mapping[int, Sequence[Kernel]], length: int, whole: int) -> list[Kernel] | None:
    """The kernels at a length between two neighbours of `known`, or None if four of them around do not tell."""
    alike = sorted(other for other in known if (other - length) % whole == 0)
    place = next((i for i, other in enumerate(alike) if other > length), len(alike))
    first = min(max(0, place - 2), len(alike) - _DEGREE - 2)
    near = alike[max(0, first) : max(0, first) + _DEGREE + 2]
    if len(near) < _DEGREE + 2 or not near[0] < length < near[-1]:
        return None
    rows = [known[other] for other in near]
    if len({tuple((kernel.name, kernel.launches, kernel.operators) for kernel in row) for row in rows}) > 1:
        return None
    between = [_kernel(near, kernels, length) for kernels in zip(*rows, strict=True)]
    return [kernel for kernel in between if kernel is not None] if None not in between else None


def _kernel(lengths: Sequence[int], kernels: Sequence[Kernel], length: int) -> Kernel | None:
    values: dict[str, Any] = {}
    for name in _COUNTS:
        numbers: list[Number] = [getattr(kernel, name) for kernel in kernels]
        own = [number.value for number in numbers]
        if polynomial_at(lengths[:-1], own[:-1], lengths[-1]) != own[-1]:
            return None
        values[name] = Number(
            int(polynomial_at(lengths[:-1], own[:-1], length)), all(number.exact for number in numbers)
        )
    return replace(kernels[0], **values)


def polynomial_at(places: Sequence[int], values: Sequence[int], place: int) -> Fraction:
    """The polynomial through (places, values), at `place` (Lagrange)."""
    value_at = Fraction(0)
    for i, (own, value) in enumerate(zip(places, values, strict=True)):
        term = Fraction(value)
        for j, other in enumerate(places):
            if j != i:
                term *= Fraction(place - other, own - other)
        value_at += term
    return value_at
