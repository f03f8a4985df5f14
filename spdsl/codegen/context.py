"""context: the texts of a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import sympy

from spdsl.codegen.answer_text import AnswerText, CaseText, ExtraText, KeptText, PooledText
from spdsl.codegen.bias_text import bias_texts
from spdsl.codegen.branches import branch_text, cached_text
from spdsl.codegen.choice_text import ChoiceText, LimitsText
from spdsl.codegen.entries_text import EntriesText
from spdsl.codegen.expressions import PYTHON, TORCH, TRITON, expression
from spdsl.codegen.module_text import ModuleText
from spdsl.codegen.reads import Reads, bounded, extremes
from spdsl.codegen.softmax_text import JointText, RangeText, SkipText, SoftmaxText, SweepText
from spdsl.codegen.spelling import Spelling
from spdsl.ir.pattern import (
    Branch,
    Case,
    Choice,
    Extra,
    Gate,
    Kept,
    Kl,
    Pooled,
    Query,
    Stream,
    Tensor,
    Weight,
)
from spdsl.ir.plan import ChoicePlan, Plan, SoftmaxPlan, Sweep
from spdsl.ir.rule import Threshold, TopK, TopP
from spdsl.ir.schedule import Schedule, Stage, Walk
from spdsl.ir.skip import Skip
from spdsl.ir.symbols import LENGTH, Boolean, Expr, H, lookup_name, lookups
from spdsl.ir.visit import Range, Ranges, TileMap
from spdsl.passes.resident import resident
from spdsl.passes.schedule.buffers import sides
from spdsl.passes.schedule.extras import extra_of

Call = SoftmaxText | JointText | ChoiceText


def context(plan: Plan, schedules: Sequence[Schedule], spelling: Spelling) -> ModuleText:
    """The texts of a plan and of what its calls start.

    Its analyses go by the pattern's names, what is printed has marks for them.
    """
    learning = _learning(schedules)
    by_name = {softmax.name: _softmax(softmax, spelling, softmax.name in learning) for softmax in plan.softmaxes}
    chosen = {found.choice.name: _choice(found, by_name, spelling) for found in plan.choices}
    softmaxes = tuple(one for found in by_name.values() for one in (found, found.of_class) if one)
    joints = {
        found.name: JointText(spelling.softmax(found.name, "joint"), tuple(by_name[x] for x in found.parts))
        for found in plan.joints
    }
    texts: dict[str, Call] = {**by_name, **chosen, **joints}
    phases = {
        own.stage.phase.value: tuple(
            _case(i, case, plan, own, texts, spelling) for i, case in enumerate(plan.pattern.cases_of(own.stage.phase))
        )
        for own in schedules
        if own.stage is not Stage.BACKWARD
    }
    entries = [found for found in plan.pattern.inputs if isinstance(found, Stream) and found.compress]
    pattern = spelling.of(plan.pattern)
    gates = [branch for case in pattern.cases for branch in (case.branch, *case.extras) if isinstance(branch, Gate)]
    return ModuleText(
        spelling, pattern, softmaxes, tuple(joints.values()),
        tuple(found for found in pattern.inputs if isinstance(found, Query)),
        tuple(found for found in pattern.inputs if isinstance(found, Stream) and found.compress is None),
        tuple(_entries(found, plan, spelling) for found in entries),
        tuple(found for found in pattern.inputs if isinstance(found, Weight)),
        tuple(found for found in pattern.inputs if isinstance(found, Tensor)),
        tuple(found for found in pattern.inputs if isinstance(found, Choice) and not found.listed),
        tuple(found for found in pattern.inputs if isinstance(found, Choice) and found.listed and found.given),
        tuple(chosen.values()), len(gates[0].branches) if gates else 0, phases, resident(plan),
    )  # fmt: skip


def _learning(schedules: Sequence[Schedule]) -> set[str]:
    """The softmaxes that some call takes the gradient of."""
    steps = (step for schedule in schedules if schedule.stage is Stage.BACKWARD for step in schedule.steps)
    return {step.of.name for step in steps if isinstance(step.of, SoftmaxPlan)}


def _softmax(plan: SoftmaxPlan, spelling: Spelling, learns: bool, is_class: bool = False) -> SoftmaxText:
    softmax, bias = spelling.of(plan.softmax), plan.softmax.bias
    reads = Reads({source.name: spelling.of(source) for source in plan.reads})
    name = spelling.softmax(plan.name, "class") if is_class else softmax.name
    several = len(plan.sweeps) > 1
    return SoftmaxText(
        name=name,
        query=softmax.query,
        sweeps=tuple(
            _sweep(sweep, stream, f"{name}_{stream.name}" if several else name, reads)
            for sweep in plan.sweeps
            for stream in [spelling.of(sweep.stream)]
        ),
        reads=tuple(reads.sources.values()),
        scale=expression(softmax.scale, PYTHON) if softmax.scale is not None else "",
        scaled_first=softmax.scale is not None and float(softmax.scale) <= 0,
        softcap=softmax.softcap or 0.0,
        product=softmax.product.name,
        sink=softmax.sink,
        bias="" if bias is None else expression(bias, TRITON, reads.triton),
        bias_mask="" if bias is None else _bias_text(bias, reads),
        bias_floats=() if bias is None else _float_reads(bias, reads),
        learned_reads=bias_texts(plan.learned_reads, reads) if learns else (),
        role=plan.role,
        learns=learns,
        units=spelling.of(plan.units),
        unwanted="" if plan.wanted is sympy.true else expression(sympy.to_nnf(sympy.Not(plan.wanted)), TRITON),
        pairs=plan.pairs,
        grid=plan.sweeps[0].stream.grid,
        skip_empty=bool(plan.maps),
        step=plan.step,
        of_class=_softmax(plan.of_class, spelling, learns, is_class=True) if plan.of_class else None,
        is_class=is_class,
        skip=_skip(plan.softmax.skip, reads),
    )


def _skip(skip: Skip | None, reads: Reads) -> SkipText | None:
    if skip is None:
        return None
    level, level_of = expression(skip.level, TRITON, reads.triton), expression(skip.level, TORCH, reads.torch)
    return SkipText(level, level_of, skip.rows, skip.unit, skip.restart, skip.share == "group")


def _bias_text(bias: Expr, reads: Reads) -> str:
    """A tensor, also where it is one number for all pairs."""
    text = expression(bias, TORCH, reads.torch)
    return text if bias.free_symbols - {LENGTH} else f"rt.exact({text})"


def _float_reads(bias: Expr, reads: Reads) -> tuple[str, ...]:
    read = {lookup_name(found) for found in lookups(bias)}
    sources = [x for name, x in reads.sources.items() if name in read]
    return tuple(x.name for x in sources if isinstance(x, Tensor) and x.dtype == "float")


def _sweep(sweep: Sweep, stream: Stream, name: str, reads: Reads) -> SweepText:
    ranges = sweep.visit if isinstance(sweep.visit, Ranges) else Ranges((), ())
    tiles = sweep.visit if isinstance(sweep.visit, TileMap) else TileMap(sympy.true, sympy.false)
    reads = bounded(reads, tiles.may, tiles.must)

    def triton(value: Expr | Boolean) -> str:
        return expression(value, TRITON, reads.triton)

    def torch(value: Expr | Boolean) -> str:
        return expression(value, TORCH, reads.torch)

    def python(value: Expr | Boolean) -> str:
        return expression(value, PYTHON)

    return SweepText(
        name=name,
        stream=stream,
        ranges=isinstance(sweep.visit, Ranges),
        line=sweep.line,
        visible=triton(sweep.test),
        by_head=sweep.test != _of_positions(sweep.test),
        mask=torch(sweep.test),
        keys=tuple(_range(found, triton) for found in ranges.keys),
        rows=tuple(_range(found, triton) for found in ranges.rows),
        visits=tuple(_range(_any_head(found), python) for found in ranges.keys),
        decode=tuple(_range(found, triton) for found in sweep.decode),
        decode_visits=tuple(_range(found, python) for found in sweep.decode),
        may=torch(tiles.may),
        must=torch(tiles.must),
        extremes=tuple(extremes(reads, tiles.may, tiles.must, torch)),
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


def _choice(plan: ChoicePlan, softmaxes: dict[str, SoftmaxText], spelling: Spelling) -> ChoiceText:
    choice = plan.choice
    assert choice.score is not None
    reads = Reads({source.name: spelling.of(source) for source in (*plan.reads, *plan.at_call)})
    return ChoiceText(
        spelling.of(choice), softmaxes[choice.score.softmax.name], choice.score.probability,
        expression(plan.forced, TRITON, reads.triton), expression(plan.allowed, TRITON, reads.triton),
        expression(plan.forced, TORCH, reads.torch), expression(plan.allowed, TORCH, reads.torch),
        spelling.of(plan), _limits(choice, reads) if choice.at_call else None,
    )  # fmt: skip


def _limits(choice: Choice, reads: Reads) -> LimitsText:
    def text(value: Expr) -> str:
        if not value.is_number:
            return expression(value, TORCH, reads.of_inputs)
        return str(value) if value.is_Integer else repr(float(value)) if value.is_finite else f'float("{float(value)}")'

    count = choice.rule.count.value if isinstance(choice.rule, TopK) else choice.most
    most = sympy.oo if count is None else sympy.Integer(count) if isinstance(count, int) else count
    level = -sympy.oo
    if isinstance(choice.rule, Threshold | TopP):  # a part of all mass takes the place of a level
        level = choice.rule.level if isinstance(choice.rule, Threshold) else choice.rule.part
    used = {symbol for value in choice.at_call for symbol in value.free_symbols}
    return LimitsText(text(-_floor(-choice.least)), text(_floor(most)), text(level), H in used, LENGTH in used)


def _floor(value: Expr) -> Expr:
    """Of a fraction of whole numbers, which torch would round before; of others the library takes it."""
    return sympy.floor(value) if all(read.is_integer for read in lookups(value)) else value


def _entries(stream: Stream, plan: Plan, spelling: Spelling) -> EntriesText:
    assert stream.compress is not None
    inputs = {found.name: found for found in plan.pattern.inputs}
    source, logits = inputs[stream.compress.source], inputs.get(stream.compress.logits or "")
    assert isinstance(source, Stream)
    assert logits is None or isinstance(logits, Stream)
    weights = [x.name for x in plan.pattern.inputs if isinstance(x, Weight) and x.stream == stream.name]
    of_sides = tuple(
        tuple(spelling.input(name) for name in weights if name.startswith(f"{stream.name}_{side}_")) for side in "kv"
    )
    of_streams = spelling.of(stream), spelling.of(source), spelling.of(logits)
    return EntriesText(*of_streams, of_sides, len(sides(plan, stream)) > 1, stream in plan.pattern.kept)


def _case(
    number: int, case: Case, plan: Plan, schedule: Schedule, texts: Mapping[str, Call], spelling: Spelling
) -> CaseText:
    """How a call answers: what the steps of its schedule belong to, in their order, then its results."""
    read = [] if case.condition is None else lookups(case.condition)
    scalars = {lookup_name(found): spelling.input(lookup_name(found)) for found in read}
    condition = ""
    if case.condition is not None:
        condition = expression(case.condition, TORCH, lambda found, _: scalars[lookup_name(found)])
    uses_length = case.condition is not None and LENGTH in case.condition.free_symbols
    gated = any(isinstance(branch, Gate) for branch in (case.branch, *case.extras))
    extras = [_extra(i, extra, plan, texts, spelling) for i, extra in enumerate(case.extras, 1)]
    joints = {tuple(part.name for part in one.parts): one for one in texts.values() if isinstance(one, JointText)}
    parts = dict.fromkeys(step.part for step in schedule.steps if step.case == number)
    calls = tuple(texts[name] for name in parts if name in texts)
    alone = tuple(part for call in calls for part in (call.parts if isinstance(call, JointText) else (call,)))
    result = spelling.of(case.branch)

    def answer(calls: tuple[Call, ...], text: Callable[[Branch], str], scores: bool = True) -> AnswerText:
        left = [one for one in extras if scores or not isinstance(one, ExtraText)]
        own = (text(one) if isinstance(one, Branch) else one for one in left)
        return AnswerText(calls, text(result), tuple(own))

    own = (
        answer(calls, lambda branch: branch_text(branch, joints)) if schedule.stage is Stage.FORWARD
        else answer(calls, cached_text, scores=False)
    )  # fmt: skip
    return CaseText(condition, uses_length, tuple(scalars.values()), gated, answer(alone, branch_text), own)


def _extra(
    number: int, extra: Extra, plan: Plan, texts: Mapping[str, Call], spelling: Spelling
) -> Branch | ExtraText | KeptText:
    """A score or a divergence, walked by kernels or computed by torch as the schedule says."""
    if isinstance(extra, Kept):
        softmax = texts[extra.softmax.name]
        assert isinstance(softmax, SoftmaxText)
        return KeptText(softmax)
    found = extra_of(plan, number, extra)
    if found is None or isinstance(extra, Branch):
        assert isinstance(extra, Branch)
        return spelling.of(extra)
    grains = {"target": extra.target, "score": extra.score} if isinstance(extra, Kl) else {"score": extra}
    parts = tuple(_pooled(name, side, texts) for name, side in grains.items())
    return ExtraText(f"result_{number}", parts, spelling.of(found.choice), isinstance(found, Walk))


def _pooled(prefix: str, pooled: Pooled, texts: Mapping[str, Call]) -> PooledText:
    softmax = texts[pooled.score.softmax.name]
    assert isinstance(softmax, SoftmaxText)
    return PooledText(
        prefix, softmax, pooled.score.probability, pooled.unit, pooled.rows, pooled.share,
        pooled.heads_by, pooled.rows_by, pooled.unit_by,
    )  # fmt: skip
