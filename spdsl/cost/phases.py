"""phases: the kernels of training forward and backward, of prefill and of a decode step."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum

import sympy

from spdsl.cost import around, attend, chosen, extras, join, pairs, together
from spdsl.cost.kernels import NONE, USUAL, Call, Kernel, Options
from spdsl.cost.machine import Machine
from spdsl.ir.pattern import Phase
from spdsl.ir.plan import Plan, Role
from spdsl.ir.symbols import LENGTH
from spdsl.passes.count import Shape


class Stage(Enum):
    """What is costed: a call, or the backward of one."""

    FORWARD = "forward"
    BACKWARD = "backward"
    PREFILL = "prefill"
    DECODE = "decode"

    @property
    def phase(self) -> Phase:
        return {"prefill": Phase.PREFILL, "decode": Phase.DECODE}.get(self.value, Phase.TRAIN)


def stages(plan: Plan) -> list[Stage]:
    """Those that the pattern answers."""
    return [stage for stage in Stage if plan.pattern.cases_of(stage.phase)]


def kernels(
    plan: Plan, stage: Stage, length: int, shape: Shape, machine: Machine, options: Options = USUAL
) -> list[Kernel]:
    """Of a call with `length` tokens for each sequence: all new, or in a decode step the last. Raises DependsOnData."""
    call = Call(plan, stage.phase, length, shape, machine, options)
    return {
        Stage.FORWARD: _train, Stage.BACKWARD: _backward, Stage.PREFILL: _cached, Stage.DECODE: _cached,
    }[stage](call)  # fmt: skip


def _train(call: Call) -> list[Kernel]:
    return [*around.compress(call), *_attention(call), *together.forward(call), *extras.forward(call)]


def _cached(call: Call) -> list[Kernel]:
    results = (join.results if call.phase is Phase.DECODE else together.forward)(call)
    return [*around.cached(call), *_attention(call), *results, *together.settled(call)]


def _attention(call: Call) -> list[Kernel]:
    """In the order in which each needs the other."""
    found: list[Kernel] = []
    softmaxes = {one.name: one for one in call.softmaxes}
    choices = {one.choice: one for one in call.choices}
    for step in call.count.computed(call.phase):
        if step in choices:
            found += chosen.select(call, choices[step])
        elif step.name in softmaxes:
            found += _softmax(call, step.name)
    return found


def _softmax(call: Call, name: str) -> list[Kernel]:
    softmax = next(one for one in call.softmaxes if one.name == name)
    if softmax.role is Role.LOGITS:
        return []
    one_query = call.phase is Phase.DECODE
    if softmax.units is not None:
        whole = pairs.forward if softmax.pairs else chosen.forward
        found = list((chosen.decode if one_query else whole)(call, softmax, softmax.units))
    else:
        found = list((attend.decode if one_query else attend.forward)(call, softmax))
    asks = one_query or not softmax.pairs  # programs that gather the queries of a unit do not
    answers = softmax.wanted.xreplace({LENGTH: sympy.Integer(call.length)}) is not sympy.false
    return found if answers or not asks else [_idle(kernel) for kernel in found]


def _idle(kernel: Kernel) -> Kernel:
    """Its programs return at once: another result answers at this length."""
    return replace(kernel, flops=NONE, machine=NONE, exps=NONE, bytes=NONE, moved=NONE)


def _backward(call: Call) -> list[Kernel]:
    found: list[Kernel] = [*extras.backward(call), *together.backward(call)]
    for softmax in reversed(call.softmaxes):
        if softmax.role is not Role.BRANCH:
            continue
        if softmax.units is not None:
            found += (pairs if softmax.pairs else chosen).backward(call, softmax, softmax.units)
        else:
            found += attend.backward(call, softmax)
    return found + list(around.compress_backward(call))
