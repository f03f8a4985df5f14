"""phases: what a call starts, as kernels with their work: the steps of its schedule that its sizes let start."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import groupby
from typing import Any

import sympy

from spdsl.cost.conditions import starts, turns
from spdsl.cost.kernels import NONE, USUAL, Call, Kernel, Options
from spdsl.cost.machine import Machine
from spdsl.cost.operators import operators
from spdsl.cost.work import WORK
from spdsl.ir.pattern import Phase
from spdsl.ir.plan import Plan
from spdsl.ir.schedule import Stage, Step
from spdsl.ir.symbols import LENGTH
from spdsl.passes.count import Shape
from spdsl.passes.schedule import schedule, stages

__all__ = ["Stage", "kernel", "kernels", "launches", "stages", "started"]


def kernels(
    plan: Plan, stage: Stage, length: int, shape: Shape, machine: Machine, options: Options = USUAL
) -> list[Kernel]:
    """Of a call with `length` tokens for each sequence: all new, or in a decode step the last. Raises DependsOnData."""
    call = Call(plan, stage, length, shape, machine, options)
    return [kernel(call, step) for step in started(call)]


def launches(call: Call) -> list[str]:
    """The kernels that the call launches, in order."""
    names_in_order: list[str] = []
    for _, group in groupby(started(call), key=lambda step: (step.turns_of, step.part if step.turns_of else "")):
        steps = list(group)
        names = [step.kernel for step in steps if step.kernel]
        names_in_order += names * turns(call, steps[0])
    return names_in_order


def started(call: Call) -> Iterator[Step[Any]]:
    """The steps that the call starts: with a cache those of every case, else of the one that answers."""
    cases = call.plan.pattern.cases_of(call.phase)
    answering = cases.index(call.count.case(call.phase)) if call.phase is Phase.TRAIN else None
    for step in _steps(call.count.plan, call.stage):
        if (answering is None or step.case in (None, answering)) and starts(call, step):
            yield step


@lru_cache(maxsize=64)
def _steps(plan: Plan, stage: Stage) -> tuple[Step[Any], ...]:
    return schedule(plan, stage).steps


def kernel(call: Call, step: Step[Any]) -> Kernel:
    """A step with its work; programs whose result another one answers return at once."""
    work = WORK[step.kind](call, step)
    if step.wanted.xreplace({LENGTH: sympy.Integer(call.length)}) is sympy.false:
        work = replace(work, flops=NONE, machine=NONE, exps=NONE, bytes=NONE, moved=NONE)
    times = turns(call, step)
    return replace(
        work, launches=times if step.kernel else 0, operators=len(step.filled) + times * operators(call, step)
    )
