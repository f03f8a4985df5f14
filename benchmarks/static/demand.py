"""How many pairs a kernel of ours multiplies in a call, and how many of them are useful, as the cost model counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

from benchmarks.static.masked import masked
from spdsl.cost.kernels import Call, Kernel, Options
from spdsl.cost.machine import machine_of
from spdsl.cost.pair_products import KINDS, SCORES
from spdsl.cost.phases import kernel, started
from spdsl.ir.plan import Plan, SoftmaxPlan
from spdsl.ir.schedule import Kind, Stage, Step
from spdsl.passes.count import Shape
from spdsl.targets import Target

TOKENS = 65_536
_RANGES = {Kind.FORWARD, Kind.DQ, Kind.DKDV}


@dataclass(frozen=True, slots=True)
class Demand:
    """Of one kernel in a call of TOKENS tokens, or a step over as many."""

    form: str
    per_pair: int
    """Multiplications of its tile for a pair."""
    useful: int
    """Pairs that are visible, or chosen."""
    alike: int
    """Pairs that its tiles multiply where neighbouring queries choose alike."""
    apart: int
    """The same where they choose nothing in common, but for what is forced."""
    moved: int
    """Bytes, each tensor once."""
    masked: float
    """The share of the multiplied pairs in blocks where not every pair is visible."""
    turns: float
    """Iterations of the innermost loop in one of the loop around it; 0: so many that it does not matter."""

    def multiplied(self, agreement: float) -> float:
        """By the share of the room of their union that neighbours leave unused."""
        return agreement * self.alike + (1 - agreement) * self.apart

    def waste(self, agreement: float) -> float:
        """Multiplied pairs for each useful one."""
        return self.multiplied(agreement) / self.useful

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def demands(plan: Plan, stage: Stage, module: ModuleType, shape: Shape, target: Target) -> dict[str, Demand]:
    """By name, of every kernel of a stage that multiplies pairs, if its result is read at this length."""
    alike, apart = (
        Call(plan, stage, TOKENS, shape, machine_of(target), Options(overlap=overlap)) for overlap in (1.0, 0.0)
    )
    works = ((step, kernel(alike, step), kernel(apart, step)) for step in _steps(alike))
    return {step.kernel: _demand(alike, step, *both, module) for step, *both in works if both[0].flops.value}


def _steps(call: Call) -> Iterator[Step[Any]]:
    """None where the pattern has no such phase."""
    steps = started(call) if call.plan.pattern.cases_of(call.phase) else iter(())
    return (step for step in steps if step.kernel and step.kind in KINDS)


def _demand(call: Call, step: Step[Any], alike: Kernel, apart: Kernel, module: ModuleType) -> Demand:
    softmax, scores = _softmax(call, step), step.kind in SCORES
    tile = call.tile_flops(step.kind, softmax)
    return Demand(
        form=step.kind.value,
        per_pair=tile // 2,
        useful=alike.flops.value // call.pair_flops(step.kind, softmax),
        alike=alike.machine.value // tile,
        apart=apart.machine.value // tile,
        moved=alike.bytes.value,
        masked=masked(call, step, module) if step.kind in _RANGES else 0.0,
        turns=len(step.of.weights) - step.of.shared if scores else 0.0,
    )


def _softmax(call: Call, step: Step[Any]) -> SoftmaxPlan:
    """Whose pairs they are: of a choice, the softmax that scores."""
    if isinstance(step.of, SoftmaxPlan):
        return step.of
    name = step.of.choice.score.softmax.name
    return next(one for one in call.count.plan.softmaxes if one.name == name)
