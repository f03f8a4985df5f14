"""aligned: the plan with every element test in its shortest form.

The choice of tiles per target, and the checks of the plan against the hardware, have their place here.
"""

from __future__ import annotations

from dataclasses import replace

from spdsl.ir.plan import Plan, SoftmaxPlan, Sweep
from spdsl.passes.tidy import tidy


def aligned(plan: Plan) -> Plan:
    return replace(plan, softmaxes=tuple(_softmax(softmax) for softmax in plan.softmaxes))


def _softmax(plan: SoftmaxPlan) -> SoftmaxPlan:
    of_class = _softmax(plan.of_class) if plan.of_class else None
    return replace(plan, sweeps=tuple(_sweep(sweep) for sweep in plan.sweeps), of_class=of_class)


def _sweep(sweep: Sweep) -> Sweep:
    return replace(sweep, test=tidy(sweep.test))
