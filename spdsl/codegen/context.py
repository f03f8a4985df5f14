"""context: the texts of a plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import sympy

from spdsl.codegen.expressions import PYTHON, TORCH, TRITON, expression
from spdsl.codegen.reads import Reads, extremes
from spdsl.codegen.texts import CaseText, ModuleText, RangeText, SoftmaxText, SweepText
from spdsl.ir.pattern import Branch, Case, Choice, Gate, Phase, Query, Softmax, Stream, Tensor
from spdsl.ir.plan import Form, Plan, Range, SoftmaxPlan, Sweep
from spdsl.ir.symbols import LENGTH, Boolean, Expr, H, lookup_name, lookups


def context(plan: Plan) -> ModuleText:
    """The texts of a plan."""
    pattern = plan.pattern
    whole = tuple(_softmax(found) for found in plan.softmaxes)
    by_name = {found.name: found for found in whole}
    softmaxes = tuple(one for found in whole for one in (found, found.of_class) if one)
    phases = {
        phase.value: tuple(_case(case, by_name) for case in pattern.cases_of(phase))
        for phase in Phase
        if pattern.cases_of(phase)
    }
    gates = [branch for case in pattern.cases for branch in (case.branch, *case.extras) if isinstance(branch, Gate)]
    return ModuleText(
        pattern, softmaxes,
        tuple(found for found in pattern.inputs if isinstance(found, Query)),
        tuple(found for found in pattern.inputs if isinstance(found, Stream)),
        tuple(found for found in pattern.inputs if isinstance(found, Tensor)),
        tuple(found for found in pattern.inputs if isinstance(found, Choice)),
        len(gates[0].branches) if gates else 0, phases,
    )  # fmt: skip


def _softmax(plan: SoftmaxPlan, is_class: bool = False) -> SoftmaxText:
    softmax, bias = plan.softmax, plan.softmax.bias
    reads = Reads({source.name: source for source in plan.reads})
    several = len(plan.sweeps) > 1
    return SoftmaxText(
        name=plan.name,
        query=softmax.query,
        sweeps=tuple(
            _sweep(sweep, f"{plan.name}_{sweep.stream.name}" if several else plan.name, reads) for sweep in plan.sweeps
        ),
        reads=plan.reads,
        scale=expression(softmax.scale, PYTHON) if softmax.scale is not None else "",
        softcap=softmax.softcap or 0.0,
        sink=softmax.sink,
        bias="" if bias is None else expression(bias, TRITON, reads.triton),
        bias_mask="" if bias is None else expression(bias, TORCH, reads.torch),
        bias_reads=() if bias is None else _float_reads(bias, plan.reads),
        skip_empty=any(sweep.form is Form.LISTS for sweep in plan.sweeps),
        step=plan.step,
        of_class=_softmax(plan.of_class, is_class=True) if plan.of_class else None,
        is_class=is_class,
    )


def _float_reads(bias: Expr, sources: tuple[Tensor | Choice, ...]) -> tuple[str, ...]:
    read = {lookup_name(found) for found in lookups(bias)}
    return tuple(x.name for x in sources if isinstance(x, Tensor) and x.dtype == "float" and x.name in read)


def _sweep(sweep: Sweep, name: str, reads: Reads) -> SweepText:
    def triton(value: Expr | Boolean) -> str:
        return expression(value, TRITON, reads.triton)

    def torch(value: Expr | Boolean) -> str:
        return expression(value, TORCH, reads.torch)

    def python(value: Expr | Boolean) -> str:
        return expression(value, PYTHON)

    return SweepText(
        name=name,
        stream=sweep.stream,
        ranges=sweep.form is Form.RANGES,
        line=sweep.line,
        visible=triton(sweep.test),
        mask=torch(sweep.test),
        keys=tuple(_range(found, triton) for found in sweep.keys),
        rows=tuple(_range(found, triton) for found in sweep.rows),
        visits=tuple(_range(_any_head(found), python) for found in sweep.keys),
        decode=tuple(_range(found, triton) for found in sweep.decode),
        decode_visits=tuple(_range(found, python) for found in sweep.decode),
        may=torch(sweep.may),
        must=torch(sweep.must),
        extremes=tuple(extremes(sweep.may, sweep.must, reads.sources, torch)),
    )


def _range(found: Range, text: Callable[[Expr | Boolean], str]) -> RangeText:
    condition = "" if found.condition is sympy.true else text(found.condition)
    full = "True" if found.full == found.condition else "False" if found.full is sympy.false else text(found.full)
    return RangeText(text(found.first), text(found.end), condition, text(found.full_first), text(found.full_end), full)


def _any_head(found: Range) -> Range:
    """The range of all heads together: conditions on the head hold for some head, and no tile is full for all."""
    full = found.full if found.full == _of_positions(found.full) else sympy.false
    return replace(found, condition=_of_positions(found.condition), full=full)


def _of_positions(condition: Boolean) -> Boolean:
    """The part of a conjunction that knows neither head nor tensors."""
    parts = condition.args if isinstance(condition, sympy.And) else (condition,)
    return sympy.And(*(part for part in parts if not lookups(part) and H not in part.free_symbols))


def _case(case: Case, softmaxes: dict[str, SoftmaxText]) -> CaseText:
    used: dict[str, SoftmaxText] = {}
    result = _branch(case.branch, softmaxes, used)
    extras = tuple(_branch(extra, softmaxes, used) for extra in case.extras)
    condition = "" if case.condition is None else expression(case.condition, TORCH, lambda read, _: lookup_name(read))
    uses_length = case.condition is not None and LENGTH in case.condition.free_symbols
    return CaseText(condition, uses_length, tuple(used.values()), result, extras)


def _branch(branch: Branch, softmaxes: dict[str, SoftmaxText], used: dict[str, SoftmaxText]) -> str:
    if isinstance(branch, Softmax):
        used.setdefault(branch.name, softmaxes[branch.name])
        return f"{branch.name}_part"
    parts = ", ".join(_branch(inner, softmaxes, used) for inner in branch.branches)
    return f"gate([{parts}], gates)" if isinstance(branch, Gate) else f"merge([{parts}])"
