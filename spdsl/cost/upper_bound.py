"""upper_bound: a plan in which whatever only tensors tell is taken as true: its counts are the most there can be."""

from __future__ import annotations

from dataclasses import replace

import sympy
from sympy.logic.boolalg import to_nnf

from spdsl.ir.plan import Plan, SoftmaxPlan, Sweep
from spdsl.ir.symbols import Boolean, lookups


def upper_bound(plan: Plan) -> Plan:
    return replace(plan, softmaxes=tuple(_softmax(softmax) for softmax in plan.softmaxes))


def depends(plan: Plan, name: str) -> bool:
    """Whether tensors decide what the softmax of that name sees, beside the score of the choice that it walks."""
    softmax = next(one for one in plan.softmaxes if one.name == name)
    given = softmax.units is not None and softmax.units.given
    return given or any(lookups(sweep.test) for sweep in softmax.sweeps)


def without_lookups(test: Boolean) -> Boolean:
    """The test with every atom that reads a tensor taken as true, negated ones too."""
    return _true_where_read(to_nnf(test, simplify=False))


def _true_where_read(test: Boolean) -> Boolean:
    if not lookups(test):
        return test
    if isinstance(test, sympy.And | sympy.Or):
        return test.func(*(_true_where_read(part) for part in test.args))
    return sympy.true


def _softmax(softmax: SoftmaxPlan) -> SoftmaxPlan:
    of_class = None if softmax.of_class is None else _softmax(softmax.of_class)
    return replace(softmax, sweeps=tuple(_sweep(sweep) for sweep in softmax.sweeps), of_class=of_class)


def _sweep(sweep: Sweep) -> Sweep:
    return replace(sweep, test=without_lookups(sweep.test)) if lookups(sweep.test) else sweep
