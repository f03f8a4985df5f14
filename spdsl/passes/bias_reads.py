"""bias_reads: the biases of a plan -> their reads of float tensors that have a gradient, each with its derivative."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import sympy
from sympy.core.function import AppliedUndef

from spdsl.budget import spend
from spdsl.ir.bias import BiasRead
from spdsl.ir.pattern import Choice, Kl, Pattern, Phase, Pooled, Softmax, Tensor
from spdsl.ir.plan import Role, SoftmaxPlan
from spdsl.ir.symbols import Expr, lookup_name, lookups
from spdsl.ir.ties import above, sides

STEPS = 20  # of the derivative of one operation


def with_bias_reads(pattern: Pattern, plans: Sequence[SoftmaxPlan]) -> tuple[SoftmaxPlan, ...]:
    """The plans with what of their biases gets a gradient: of a tensor, in all results for training or in none."""
    trained = {step.name for case in pattern.cases_of(Phase.TRAIN) for step in pattern.steps(case)}
    scored = _scored(pattern)
    own = {plan.name: plan for plan in plans if plan.name in trained and plan.softmax.bias is not None}
    found = {
        name: _differentiated(plan) if plan.role is Role.BRANCH and plan.softmax not in scored else plan
        for name, plan in own.items()
    }
    refused = {name for plan in found.values() for name in _read(plan) - {x.tensor.name for x in plan.learned_reads}}
    return tuple(_without(found[plan.name], refused) if plan.name in found else plan for plan in plans)


def _scored(pattern: Pattern) -> list[Softmax]:
    """Those whose scores are differentiated as results: that gradient reaches queries and keys alone."""
    extras = [extra for case in pattern.cases for extra in case.extras]
    scores = [extra.score if isinstance(extra, Kl) else extra for extra in extras if isinstance(extra, Kl | Pooled)]
    return [pooled.score.softmax for pooled in scores]


def _differentiated(plan: SoftmaxPlan) -> SoftmaxPlan:
    inner = plan.of_class and _differentiated(plan.of_class)
    return replace(plan, of_class=inner, bias_reads=bias_reads(plan.softmax.bias, plan.reads))


def _without(plan: SoftmaxPlan, refused: set[str]) -> SoftmaxPlan:
    inner = plan.of_class and _without(plan.of_class, refused)
    left = tuple(read for read in plan.bias_reads if read.tensor.name not in refused)
    return replace(plan, of_class=inner, bias_reads=left)


def _read(plan: SoftmaxPlan) -> set[str]:
    """The float tensors that its bias reads."""
    names = set() if plan.softmax.bias is None else {lookup_name(read) for read in lookups(plan.softmax.bias)}
    return {one.name for one in plan.reads if isinstance(one, Tensor) and one.dtype == "float" and one.name in names}


def bias_reads(bias: Expr | None, inputs: Iterable[Tensor | Choice]) -> tuple[BiasRead, ...]:
    """Those whose elements change the bias: a floor has no derivative, and what is compared stands in no bias."""
    tensors = {one.name: one for one in inputs if isinstance(one, Tensor) and one.dtype == "float"}
    reads = [] if bias is None else [read for read in lookups(bias) if lookup_name(read) in tensors]
    found = (BiasRead(tensors[lookup_name(read)], read, derivative(bias, read)) for read in reads)
    return tuple(one for one in found if one.slope != 0)


def derivative(value: Expr, read: Expr) -> Expr:
    """The derivative of an element expression by a tensor read: at a tie both sides of min and max have a half."""
    if value == read:
        return sympy.S.One
    if isinstance(value, AppliedUndef | sympy.floor) or not value.has(read):
        return sympy.S.Zero
    spend(STEPS * len(value.args))
    if isinstance(value, sympy.Add):
        return sympy.Add(*(derivative(term, read) for term in value.args))
    if isinstance(value, sympy.Mul):
        return sympy.Add(*(_others(value, i) * derivative(factor, read) for i, factor in enumerate(value.args)))
    if isinstance(value, sympy.Pow):
        return value.exp * value.base ** (value.exp - 1) * derivative(value.base, read)
    if isinstance(value, sympy.Max | sympy.Min):
        return _of_sides(value, read)
    if isinstance(value, sympy.Abs):
        inner = value.args[0]
        return (2 * above(inner, sympy.S.Zero) - 1) * derivative(inner, read)
    assert isinstance(value, sympy.Mod), value
    number, divisor = value.args
    return derivative(number, read) - sympy.floor(number / divisor) * derivative(divisor, read)


def _others(product: sympy.Mul, i: int) -> Expr:
    return sympy.Mul(*product.args[:i], *product.args[i + 1 :])


def _of_sides(value: Expr, read: Expr) -> Expr:
    """Of max(a, max(b, c)), as it is computed."""
    one, *rest = sides(value)
    other = value.func(*rest)
    a, b = (one, other) if isinstance(value, sympy.Max) else (other, one)
    return above(a, b) * derivative(one, read) + above(b, a) * derivative(other, read)
