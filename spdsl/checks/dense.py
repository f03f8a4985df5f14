"""dense: a pattern that takes longer than dense attention at the length it is written for.

Judged by the cost model at its best: neighbours that choose alike, a decode step without the launches. So the warning
is silent where the model cannot be sure.
"""

from __future__ import annotations

from collections.abc import Iterator

from spdsl.budget import TooMuch, at_most
from spdsl.checks.view import View, warning
from spdsl.cost.kernels import Kernel, Options, count_of
from spdsl.cost.machine import machine_of
from spdsl.cost.phases import Stage, kernels, stages
from spdsl.cost.report import duration
from spdsl.cost.roofline import dense_seconds, selecting_share, time
from spdsl.cost.upper_bound import depends
from spdsl.diagnostics import Diagnostic
from spdsl.ir.pattern import Phase
from spdsl.ir.plan import Role
from spdsl.passes.visible import DependsOnData
from spdsl.targets import USUAL, Target, find

AT_BEST = Options(overlap=1.0)


def slower_than_dense(view: View) -> Iterator[Diagnostic]:
    """W510, if a length is declared."""
    length = view.expected.length
    if length is None or any(depends(view.plan, softmax.name) for softmax in view.plan.softmaxes):
        return
    target = view.target or find(USUAL)
    try:
        with at_most(view.estimates):
            slower = list(_slower(view, length, target))
    except (DependsOnData, TooMuch, ValueError):
        return
    if not slower:
        return
    parts = ", ".join(f"{stage.value} {duration(own)} against {duration(dense)}" for stage, own, dense, _ in slower)
    share = max(selecting for _, _, _, selecting in slower)
    notes = [f"estimated by `spdsl cost` for {target.name}, at best: {parts}"]
    if share > 0.1:
        notes.append(f"up to {share:.0%} of it scores and chooses")
    first = view.plan.pattern.cases[0]
    yield warning(
        "W510",
        f"slower than dense attention at {length:,} tokens on {target.name}: "
        + ", ".join(f"{stage.value} {own / dense:.2g} times its time" for stage, own, dense, _ in slower),
        first.span,
        "slower than attend(all)",
        *notes,
    )


def _slower(view: View, length: int, target: Target) -> Iterator[tuple[Stage, float, float, float]]:
    """Stages that lose: their seconds, dense attention's, and the share of selection."""
    for stage in stages(view.plan):
        if stage is Stage.PREFILL and Phase.TRAIN in {
            phase for case in view.plan.pattern.cases for phase in case.phases
        }:
            continue  # as forward
        started = kernels(view.plan, stage, length, view.shape, machine_of(target), AT_BEST)
        if _is_dense(view, stage, length):
            continue
        dense = dense_seconds(stage, length, view.shape, target, view.plan.pattern.causal)
        own = sum(_seconds(kernel, target, view.shape.size, stage) for kernel in started)
        if own > dense:
            yield stage, own, dense, selecting_share(started, target, view.shape.size)


def _seconds(kernel: Kernel, target: Target, size: int, stage: Stage) -> float:
    """Launches of a decode step hide behind others in a graph of a whole model."""
    spent = time(kernel, target, size)
    return spent.seconds - (spent.launches if stage is Stage.DECODE else 0.0)


def _is_dense(view: View, stage: Stage, length: int) -> bool:
    """Nothing is left out, so nothing is to be gained."""
    count = count_of(view.plan, length, view.shape)
    names = {step.name for step in count.computed(stage.phase)}
    branches = [softmax for softmax in count.plan.softmaxes if softmax.name in names and softmax.role is Role.BRANCH]
    every = length * (length + 1) // 2 if view.plan.pattern.causal else length * length
    return len(branches) == 1 and count.pairs(branches[0]).value >= every * count.heads(branches[0].softmax)
