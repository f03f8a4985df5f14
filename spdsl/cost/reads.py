"""reads: the keys and values that a decode step reads, softmax by softmax, beside those of dense attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spdsl.cost.choose import scoring
from spdsl.cost.kernels import NONE, USUAL, Call, Options
from spdsl.cost.machine import Machine
from spdsl.cost.phases import started
from spdsl.ir.plan import Plan, SoftmaxPlan
from spdsl.ir.schedule import Kind, Stage, Step
from spdsl.passes.count import Number, Read, Shape
from spdsl.passes.schedule.choose import scorings


@dataclass(frozen=True, slots=True)
class StepReads:
    """What one new token at the end of a sequence of `length` reads, and the bytes that dense attention reads there."""

    length: int
    reads: tuple[Read, ...]
    dense_bytes: int

    @property
    def keys(self) -> Number:
        return sum((read.keys for read in self.reads), NONE)

    @property
    def bytes(self) -> Number:
        return sum((read.bytes for read in self.reads), NONE)


def step_reads(plan: Plan, length: int, shape: Shape, options: Options = USUAL) -> StepReads:
    """Of the result that answers at this length. Raises DependsOnData where that is not known."""
    call = Call(plan, Stage.DECODE, length, shape, Machine(), options)
    names = {softmax.name for softmax in call.count.softmaxes(Stage.DECODE.phase)}
    softmaxes = dict.fromkeys(read for step in started(call) for read in _read_by(call, step))
    reads = tuple(_thinned(call, softmax) for softmax in softmaxes if softmax.name in names)
    row = shape.kv_heads * (shape.qk + shape.v) * shape.size
    return StepReads(length, reads, shape.batch * length * row)


def _read_by(call: Call, step: Step[Any]) -> tuple[SoftmaxPlan, ...]:
    """A step walks the keys of one softmax, or scores those of another."""
    if step.kind in (Kind.DECODE, Kind.UNIT_DECODE):
        return (step.of,)
    if step.kind is Kind.MULTIPLY_CELLS:
        return (scorings(call.plan, step.of)[step.index],)
    return (scoring(call, step.of),) if step.kind in (Kind.SELECT, Kind.SCORE_UNITS) else ()


def _thinned(call: Call, softmax: SoftmaxPlan) -> Read:
    """Where only tensors tell what it sees: the most, or the declared share."""
    read = call.count.read(softmax)
    return Read(read.softmax, call.thinned(softmax, read.keys), call.thinned(softmax, read.bytes))
