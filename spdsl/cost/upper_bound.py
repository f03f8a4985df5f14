"""upper_bound: a plan in which whatever only tensors tell is taken as true: its counts are the most there can be."""

from __future__ import annotations

from dataclasses import replace

from spdsl.ir.pattern import Choice
from spdsl.ir.plan import Plan, SoftmaxPlan, Sweep
from spdsl.ir.symbols import lookup_name, lookups
from spdsl.passes.tile_choices import without_lookups


def upper_bound(plan: Plan) -> Plan:
    return replace(plan, softmaxes=tuple(_softmax(softmax) for softmax in plan.softmaxes))


def depends(plan: Plan, name: str) -> bool:
    """Whether tensors decide what the softmax of that name sees, beside the scores of choices, whose lists have room
    for so many units.
    """
    softmax = next(one for one in plan.softmaxes if one.name == name)
    if softmax.units is not None and softmax.units.given:
        return True
    scored = {one.name for one in softmax.reads if isinstance(one, Choice) and one.tiled}
    return any(lookup_name(read) not in scored for sweep in softmax.sweeps for read in lookups(sweep.test))


def _softmax(softmax: SoftmaxPlan) -> SoftmaxPlan:
    of_class = None if softmax.of_class is None else _softmax(softmax.of_class)
    return replace(softmax, sweeps=tuple(_sweep(sweep) for sweep in softmax.sweeps), of_class=of_class)


def _sweep(sweep: Sweep) -> Sweep:
    return replace(sweep, test=without_lookups(sweep.test)) if lookups(sweep.test) else sweep
