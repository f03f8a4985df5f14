"""`spdsl cost --formulas`"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from typing import TYPE_CHECKING

import click

from spdsl.cli.counting import counting
from spdsl.cli.inputs import Failed
from spdsl.diagnostics import Source, SpatError, did_you_mean

if TYPE_CHECKING:
    from spdsl.cost.kernels import Options
    from spdsl.cost.phases import Stage
    from spdsl.cost.show_formulas import Varied
    from spdsl.ir.plan import Plan
    from spdsl.passes.count import Shape
    from spdsl.targets import Target


def print_formulas(
    plan: Plan, stages: Sequence[Stage], shape: Shape, target: Target, options: Options, varied: Varied | None
) -> None:
    """The counts of the kernels of each stage, of the length or of it and a parameter."""
    from spdsl.cost.show_formulas import show_formulas

    with counting(plan.pattern.name):
        for stage in stages:
            for line in show_formulas(plan, stage, shape, target, options, varied):
                click.echo(line)


def varied_by(source: Source, plan: Plan, params: dict[str, Fraction], name: str) -> Varied:
    """The parameter of that name, which has to be a whole number. Raises Failed."""
    from spdsl.compiler import plan_of
    from spdsl.cost.show_formulas import Varied

    values = dict(plan.pattern.params)
    if name not in values:
        hint = did_you_mean(name, values)
        raise Failed(f"{plan.pattern.name} has no parameter `{name}`{'' if hint is None else f'; {hint.text}'}")
    value = Fraction(str(values[name]))
    if value.denominator != 1 or value < 1:
        raise Failed(f"`{name}` is {values[name]}: a formula needs a whole number of at least 1")

    @cache
    def other(value: int) -> Plan | None:
        try:
            return plan_of(source, plan.pattern.name, params | {name: Fraction(value)})
        except SpatError:
            return None

    return Varied(name, int(value), other)
