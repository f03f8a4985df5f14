"""show_steps: the printed form of schedules, in 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from textwrap import wrap

import sympy

from spdsl.ir.schedule import Buffer, Event, Schedule, Step, When

WIDTH = 80
LEGEND = """\
What a call of each phase starts, in order: kernels, with what a program owns
and what it goes over, and operators of torch. Below each what it reads -> what
it writes; torch fills a buffer* first. Sizes: B sequences, N queries, M keys,
E entries, H heads, D dims.
"""
_EVENTS = {
    Event.CALLED: "on the call",
    Event.APPENDED: "when new tokens are in the cache",
    Event.CLOSED: "when the entries that they complete are, too",
    Event.ATTENDED: "when all parts of a result are there",
}


def steps(schedules: Iterable[Schedule]) -> str:
    return "\n".join((LEGEND, *(line for schedule in schedules for line in (*_schedule(schedule), ""))))


def _schedule(schedule: Schedule) -> Iterator[str]:
    yield schedule.stage.value
    for heading, group in groupby(schedule.steps, key=lambda step: _heading(schedule, step)):
        yield f"  {heading}:"
        for step in group:
            yield from _step(step)
    yield "  buffers:"
    yield from _buffers([one for step in schedule.steps for one in (*step.reads, *step.writes)])


def _heading(schedule: Schedule, step: Step[object]) -> str:
    """What the step waits for, and which result it is for, where there are several."""
    event = _EVENTS[step.event]
    if step.case is None or len(schedule.conditions) == 1:
        return event
    condition = schedule.conditions[step.case]
    return f"result {'else' if condition is None else f'if {condition}'}, {event}"


def _step(step: Step[object]) -> Iterator[str]:
    programs = f"{step.rows}, over {step.visit}" if step.visit else step.rows
    yield from _wrapped(f"{step.kernel}: {programs}" if step.kernel else f"torch: {step.name}", 4)
    if step.reads or step.writes:
        filled = {one.name for one in step.filled}
        writes = (f"{name}*" if name in filled else name for name in _names(step.writes))
        yield from _wrapped(f"{', '.join(_names(step.reads))} -> {', '.join(writes)}".strip(), 8)
    if step.when is not When.ALWAYS:
        yield from _wrapped(f"only {step.when.value}", 8)
    if step.turns_of:
        yield from _wrapped(f"for as many {step.turns_of} at a time as have room", 8)
    if step.wanted is not sympy.true:
        yield from _wrapped(f"has work only if {step.wanted}", 8)


def _names(buffers: Sequence[Buffer]) -> list[str]:
    return list(dict.fromkeys(one.name for one in buffers))


def _buffers(buffers: Sequence[Buffer]) -> Iterator[str]:
    """Each once: name, who keeps it, dtype, axes and bound."""
    known = {one.name: one for one in buffers}
    width = min(24, max((len(name) for name in known), default=0))
    for one in known.values():
        bound = ": ".join(text for text in (one.capacity, one.overflow) if text)
        axes = f"[{', '.join(one.axes)}]" + (f", {bound}" if bound else "")
        yield from _wrapped(f"{one.name:<{width}} {one.lifetime.value:<6} {one.dtype:<9} {axes}", 4, width + 22)


def _wrapped(text: str, indent: int, hanging: int = 12) -> list[str]:
    return wrap(text, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * hanging, break_long_words=False)
