"""The steps of a body, stage by stage: those of one file of the schedule alone, or all of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from spdsl.ir.schedule import Buffer, Schedule
from spdsl.passes import schedule as package
from spdsl.passes.aligned import aligned
from spdsl.passes.schedule import stages
from tests.passes.plans import plan_of

FOLDER = Path(package.__file__).parent


def schedule(body: str) -> Iterator[str]:
    """For each stage the kernels in their order, and in parentheses what torch makes."""
    for found in _schedules(body):
        yield f"{found.stage.value}: {', '.join(step.kernel or f'({step.name})' for step in found.steps)}"


def buffers(body: str) -> Iterator[str]:
    """What each stage reads and writes that no earlier stage does, in the order of the steps."""
    known: set[str] = set()
    for found in _schedules(body):
        used = {x.name: x for step in found.steps for x in (*step.reads, *step.writes) if x.name not in known}
        yield from (f"{found.stage.value}: {_buffer(x)}" for x in used.values())
        known |= set(used)


def of_file(name: str) -> Callable[[str], Iterator[str]]:
    """The steps that `name` of the schedule makes: by their kinds, which no other file names."""
    kinds = set(re.findall(r"Kind\.(\w+)", (FOLDER / f"{name}.py").read_text(encoding="utf-8")))

    def steps(body: str) -> Iterator[str]:
        for found in _schedules(body):
            own = [step for step in found.steps if step.kind.name in kinds]
            for step in own:
                reads, writes = (", ".join(x.name for x in used) or "-" for used in (step.reads, step.writes))
                yield f"{found.stage.value}: {step.kernel or step.name}, {reads} -> {writes}"

    return steps


def _schedules(body: str) -> Iterator[Schedule]:
    plan = aligned(plan_of(body))
    return (package.schedule(plan, stage) for stage in stages(plan))


def _buffer(found: Buffer) -> str:
    return f"{found.name} [{', '.join(found.axes)}] of the {found.lifetime.value}"
