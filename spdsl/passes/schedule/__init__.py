"""schedule: from a plan to what a call of each phase starts, step by step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from spdsl.ir.pattern import Branch, Case, Choice, Softmax, Stream
from spdsl.ir.plan import Joint, Plan, Role, SoftmaxPlan
from spdsl.ir.schedule import Schedule, Stage, Step, When
from spdsl.passes.schedule import attend, bias, choose, entries, extras, pairs, query_cells, results, sums, units
from spdsl.passes.schedule.buffers import Buffers

Steps = Iterable[Step[Any]]


def stages(plan: Plan) -> list[Stage]:
    """Those that the pattern answers."""
    return [stage for stage in Stage if plan.pattern.cases_of(stage.phase)]


def schedule(plan: Plan, stage: Stage) -> Schedule:
    """The steps of a stage, those of every case of its phase."""
    room = Buffers(plan, stage)
    steps = {
        Stage.FORWARD: _forward, Stage.BACKWARD: _backward, Stage.PREFILL: _cached, Stage.DECODE: _cached,
    }[stage](room)  # fmt: skip
    return Schedule(stage, tuple(steps), tuple(case.condition for case in plan.pattern.cases_of(stage.phase)))


def _forward(room: Buffers) -> Iterator[Step[Any]]:
    """Entries of all streams, then what the case that answers computes."""
    yield from choose.mapped(room)
    for stream in _compressed(room):
        yield from entries.made(room, stream)
    yield from query_cells.pooled(room)
    for number, case in enumerate(room.plan.pattern.cases_of(room.stage.phase)):
        yield from _of_case(number, _computed(room, case, set()))
        yield from _of_case(number, _combined(room, case))


def _cached(room: Buffers) -> Iterator[Step[Any]]:
    """New tokens, the entries that they close, then every case: which one answers is known on the device."""
    cases, known = room.plan.pattern.cases_of(room.stage.phase), set[str]()
    yield from entries.appended(room)
    for stream in room.plan.pattern.kept:
        yield from entries.closed(room, stream)
    yield from choose.mapped(room)
    yield from query_cells.pooled(room)
    for number, case in enumerate(cases):
        yield from _of_case(number, results.holds(room, case))
        yield from _of_case(number, _computed(room, case, known))
        yield from _of_case(number, _combined(room, case))
    yield from results.settled(room, cases)


def _backward(room: Buffers) -> Iterator[Step[Any]]:
    """What was computed last comes first, as autograd goes."""
    for number, case in enumerate(room.plan.pattern.cases_of(room.stage.phase)):
        yield from _of_case(number, _uncombined(room, case))
        calls = [call for call in _calls(room.plan, case) if not isinstance(call, Choice)]
        for call in reversed(calls):
            for softmax in _softmaxes(room.plan, call):
                if softmax.role is Role.BRANCH:
                    yield from _of_case(number, _in_part(call.name, _softmax(room, softmax)))
            for softmax in _softmaxes(room.plan, call):
                if softmax.role is Role.BRANCH:
                    yield from _of_case(number, bias.gradients(room, softmax))
        branches = tuple(
            softmax for call in calls for softmax in _softmaxes(room.plan, call) if softmax.role is Role.BRANCH
        )
        read = {sweep.stream.name for softmax in branches for sweep in softmax.sweeps}
        learning = [stream for stream in _compressed(room) if stream.name in read]
        for stream in reversed(learning):
            yield from _of_case(number, entries.gradients(room, stream))
        yield from _of_case(number, query_cells.gradients(room, branches))
        yield from _of_case(number, sums.summed(room, case, branches, learning))


def _computed(room: Buffers, case: Case, known: set[str]) -> Iterator[Step[Any]]:
    """The calls of a case in order; a list that an earlier case made serves again."""
    for call in _calls(room.plan, case, joined=not room.cached):
        if isinstance(call, Choice):
            plan = next(choice_plan for choice_plan in room.plan.choices if choice_plan.choice == call)
            steps = _in_part(call.name, choose.choose(room, plan))
            yield from (replace(step, when=When.NOT_MADE) for step in steps) if call.name in known else steps
            known.add(call.name)
            continue
        for softmax in _softmaxes(room.plan, call):
            yield from _in_part(call.name, _softmax(room, softmax))
        if isinstance(call, Joint):
            yield from _in_part(call.name, [results.joined(room, call)])


def _combined(room: Buffers, case: Case) -> Iterator[Step[Any]]:
    yield from results.combined(room, case.branch)
    for number, extra in enumerate(case.extras, 1):
        if isinstance(extra, Branch):
            yield from results.combined(room, extra)
        elif not room.cached and (further := extras.extra_of(room.plan, number, extra)) is not None:
            yield from _in_part(f"result_{number}", extras.forward(room, further))


def _uncombined(room: Buffers, case: Case) -> Iterator[Step[Any]]:
    for number, extra in reversed([*enumerate(case.extras, 1)]):
        if isinstance(extra, Branch):
            yield from results.uncombined(room, extra)
        elif (further := extras.extra_of(room.plan, number, extra)) is not None:
            yield from _in_part(f"result_{number}", extras.backward(room, further))
    yield from results.uncombined(room, case.branch)


def _softmax(room: Buffers, softmax: SoftmaxPlan) -> Iterator[Step[SoftmaxPlan]]:
    """The steps of one softmax, by the form of its sweeps and the stage."""
    steps = {
        Stage.FORWARD: (attend.forward, units.forward, pairs.forward),
        Stage.BACKWARD: (attend.backward, units.backward, pairs.backward),
        Stage.PREFILL: (attend.forward, units.forward, pairs.forward),
        Stage.DECODE: (attend.decode, units.decode, units.decode),
    }[room.stage]
    return steps[0 if softmax.units is None else 1 + softmax.pairs](room, softmax)


def _calls(plan: Plan, case: Case, joined: bool = True) -> list[Softmax | Choice | Joint]:
    """What a case computes, each after what it reads; a joint stands where the last of its parts stood."""
    steps = [step for step in plan.pattern.steps(case) if isinstance(step, Softmax) or step.selected]
    names = [step.name for step in steps]
    joints = [joint for joint in plan.joints if joined and set(joint.parts) <= set(names)]
    last = {max(joint.parts, key=names.index): joint for joint in joints}
    inside = {name for joint in joints for name in joint.parts}
    return [last.get(step.name, step) for step in steps if step.name in last or step.name not in inside]


def _softmaxes(plan: Plan, call: Softmax | Joint) -> list[SoftmaxPlan]:
    """Those of a call that have kernels: of a score by logits alone there are none."""
    names = call.parts if isinstance(call, Joint) else (call.name,)
    plans = {softmax.name: softmax for softmax in plan.softmaxes}
    return [plans[name] for name in names if plans[name].role is not Role.LOGITS]


def _compressed(room: Buffers) -> list[Stream]:
    return [stream for stream in room.plan.pattern.inputs if isinstance(stream, Stream) and stream.compress is not None]


def _of_case(number: int, steps: Steps) -> Iterator[Step[Any]]:
    return (replace(step, case=number) for step in steps)


def _in_part(name: str, steps: Steps) -> Iterator[Step[Any]]:
    return (replace(step, part=name) for step in steps)
