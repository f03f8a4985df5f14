"""context: the texts of a plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import sympy

from spdsl.codegen.branches import branch_text, cached_text
from spdsl.codegen.expressions import PYTHON, TORCH, TRITON, expression
from spdsl.codegen.module_text import AnswerText, CaseText, EntriesText, ExtraText, ModuleText, PooledText
from spdsl.codegen.reads import Reads, extremes
from spdsl.codegen.texts import ChoiceText, JointText, RangeText, SoftmaxText, SweepText
from spdsl.ir.pattern import (
    Branch,
    Case,
    Choice,
    Extra,
    Gate,
    Kl,
    Phase,
    Pooled,
    Query,
    Softmax,
    Stream,
    Tensor,
    Weight,
)
from spdsl.ir.plan import ChoicePlan, Form, Plan, Range, Role, SoftmaxPlan, Sweep
from spdsl.ir.symbols import LENGTH, Boolean, Expr, H, lookup_name, lookups
from spdsl.passes.divergence import list_of, walked_by


def context(plan: Plan) -> ModuleText:
    """The texts of a plan."""
    pattern = plan.pattern
    whole = tuple(_softmax(found) for found in plan.softmaxes)
    by_name = {found.name: found for found in whole}
    chosen = {found.choice.name: _choice(found, by_name) for found in plan.choices}
    softmaxes = tuple(one for found in whole for one in (found, found.of_class) if one)
    joints = {found.parts: JointText(found.name, tuple(by_name[x] for x in found.parts)) for found in plan.joints}
    phases = {
        phase.value: tuple(_case(case, plan, by_name, chosen, joints) for case in pattern.cases_of(phase))
        for phase in Phase
        if pattern.cases_of(phase)
    }
    gates = [branch for case in pattern.cases for branch in (case.branch, *case.extras) if isinstance(branch, Gate)]
    return ModuleText(
        pattern, softmaxes, tuple(joints.values()),
        tuple(found for found in pattern.inputs if isinstance(found, Query)),
        tuple(found for found in pattern.inputs if isinstance(found, Stream) and found.compress is None),
        tuple(_entries(found, plan) for found in pattern.inputs if isinstance(found, Stream) and found.compress),
        tuple(found for found in pattern.inputs if isinstance(found, Weight)),
        tuple(found for found in pattern.inputs if isinstance(found, Tensor)),
        tuple(found for found in pattern.inputs if isinstance(found, Choice) and not found.selected),
        tuple(chosen.values()), len(gates[0].branches) if gates else 0, phases,
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
        product=softmax.product.name,
        sink=softmax.sink,
        bias="" if bias is None else expression(bias, TRITON, reads.triton),
        bias_mask="" if bias is None else _bias_text(bias, reads),
        bias_reads=() if bias is None else _float_reads(bias, plan.reads),
        role=plan.role,
        units=plan.units,
        unwanted="" if plan.wanted is sympy.true else expression(sympy.to_nnf(sympy.Not(plan.wanted)), TRITON),
        pairs=plan.pairs,
        grid=plan.sweeps[0].stream.grid,
        skip_empty=any(sweep.form is Form.LISTS for sweep in plan.sweeps),
        step=plan.step,
        of_class=_softmax(plan.of_class, is_class=True) if plan.of_class else None,
        is_class=is_class,
    )


def _bias_text(bias: Expr, reads: Reads) -> str:
    """A tensor, also where it is one number for all pairs."""
    text = expression(bias, TORCH, reads.torch)
    return text if bias.free_symbols - {LENGTH} else f"rt.exact({text})"


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
        by_head=sweep.test != _of_positions(sweep.test),
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


def _choice(plan: ChoicePlan, softmaxes: dict[str, SoftmaxText]) -> ChoiceText:
    choice = plan.choice
    assert choice.score is not None
    reads = Reads({source.name: source for source in plan.reads})
    return ChoiceText(
        choice, softmaxes[choice.score.softmax.name], choice.score.probability,
        expression(plan.forced, TRITON, reads.triton), expression(plan.allowed, TRITON, reads.triton),
        expression(plan.forced, TORCH, reads.torch), expression(plan.allowed, TORCH, reads.torch),
        plan,
    )  # fmt: skip


def _entries(stream: Stream, plan: Plan) -> EntriesText:
    assert stream.compress is not None
    inputs = {found.name: found for found in plan.pattern.inputs}
    source, logits = inputs[stream.compress.source], inputs.get(stream.compress.logits or "")
    assert isinstance(source, Stream)
    assert logits is None or isinstance(logits, Stream)
    weights = tuple(x for x in plan.pattern.inputs if isinstance(x, Weight) and x.stream == stream.name)
    branches = [found for found in plan.softmaxes if found.role is Role.BRANCH]
    read = any(sweep.stream.name == stream.name for found in branches for sweep in found.sweeps)
    return EntriesText(stream, source, logits, weights, read)


def _case(
    case: Case,
    plan: Plan,
    softmaxes: dict[str, SoftmaxText],
    choices: dict[str, ChoiceText],
    joints: dict[tuple[str, ...], JointText],
) -> CaseText:
    steps = plan.pattern.steps(case)
    named: list[SoftmaxText | ChoiceText] = [
        choices[step.name] if isinstance(step, Choice) else softmaxes[step.name]
        for step in steps
        if isinstance(step, Softmax) or step.selected
    ]
    calls = tuple(step for step in named if isinstance(step, ChoiceText) or step.is_computed)
    condition = "" if case.condition is None else expression(case.condition, TORCH, lambda read, _: lookup_name(read))
    uses_length = case.condition is not None and LENGTH in case.condition.free_symbols
    scalars = () if case.condition is None else tuple(lookup_name(read) for read in lookups(case.condition))
    gated = any(isinstance(branch, Gate) for branch in (case.branch, *case.extras))
    plans = {found.name: found for found in plan.softmaxes}
    found = [_extra(i, extra, softmaxes, plans) for i, extra in enumerate(case.extras, 1)]

    def answer(
        calls: tuple[SoftmaxText | JointText | ChoiceText, ...], text: Callable[[Branch], str], scores: bool = True
    ) -> AnswerText:
        extras = (text(one) if isinstance(one, Branch) else one for one in found if scores or isinstance(one, Branch))
        return AnswerText(calls, text(case.branch), tuple(extras))

    return CaseText(
        condition, uses_length, scalars, gated, answer(calls, branch_text),
        answer(_joined_calls(calls, joints), lambda branch: branch_text(branch, joints)),
        answer(calls, cached_text, scores=False),
    )  # fmt: skip


def _joined_calls(
    calls: tuple[SoftmaxText | ChoiceText, ...], joints: dict[tuple[str, ...], JointText]
) -> tuple[SoftmaxText | JointText | ChoiceText, ...]:
    """A joint stands where the last of its parts stood: by then all is there that they read."""
    names = [call.name for call in calls]
    last = {max(parts, key=names.index): joint for parts, joint in joints.items() if set(parts) <= set(names)}
    inside = {name for parts in joints for name in parts}
    return tuple(last.get(call.name, call) for call in calls if call.name in last or call.name not in inside)


def _extra(
    number: int,
    extra: Extra,
    softmaxes: dict[str, SoftmaxText],
    plans: dict[str, SoftmaxPlan],
) -> Branch | ExtraText:
    if isinstance(extra, Pooled):
        return ExtraText(f"result_{number}", (_pooled("score", extra, softmaxes),))
    if isinstance(extra, Kl):
        parts = (_pooled("target", extra.target, softmaxes), _pooled("score", extra.score, softmaxes))
        target, score = (plans[side.score.softmax.name] for side in (extra.target, extra.score))
        walked = walked_by(extra, target, score) is not None
        return ExtraText(f"result_{number}", parts, list_of(extra, target, score), walked)
    return extra


def _pooled(prefix: str, pooled: Pooled, softmaxes: dict[str, SoftmaxText]) -> PooledText:
    return PooledText(
        prefix, softmaxes[pooled.score.softmax.name], pooled.score.probability, pooled.unit, pooled.rows, pooled.share,
        pooled.heads_by, pooled.rows_by, pooled.unit_by,
    )  # fmt: skip
