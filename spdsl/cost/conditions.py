"""conditions: which steps of a schedule the sizes of a call let start, and how often."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from spdsl.cost import choose, divergence, in_memory, pairs, units
from spdsl.cost.attend import walked
from spdsl.cost.cache import attempted
from spdsl.cost.kernels import Call
from spdsl.ir.plan import ChoicePlan, SoftmaxPlan
from spdsl.ir.schedule import Side, Step, Walk, When
from spdsl.ir.score import in_memory as stands_in_memory


def starts(call: Call, step: Step[Any]) -> bool:
    return step.when is When.ALWAYS or _HOLDS[step.when](call, step)


def turns(call: Call, step: Step[Any]) -> int:
    """Of heads or of rows."""
    return _TURNS[step.turns_of](call, step)


def slots(call: Call, step: Step[SoftmaxPlan]) -> int:
    """Places of a key head for the parts of units that several jobs share."""
    choice, softmax = step.of.units, step.of
    assert choice is not None
    lists = call.lists(choice, softmax) // call.count.stream(softmax.sweeps[0].stream)[0]
    if softmax.pairs:
        return units.slots(call, choice, lists, 1, pairs.tiles_of_job(call, step))
    lanes = units.walked(call, step).shape.lanes
    return units.slots(call, choice, lists, lanes, call.machine.job_tiles(choice.whole_unit))


def _has_entries(call: Call, step: Step[Side] | Step[SoftmaxPlan]) -> bool:
    of = step.of
    stream = of.stream if isinstance(of, Side) else walked(call, of).sweeps[step.index].stream
    return call.count.entries(stream) > 0


def _has_jobs(call: Call, step: Step[Any]) -> bool:
    return (divergence.slots_of(call, step) if isinstance(step.of, Walk) else slots(call, step)) > 0


def _is_learned(call: Call, step: Step[SoftmaxPlan]) -> bool:
    return call.options.learned and (step.table != "dkdv" or _has_entries(call, step))


def _pieces(call: Call, step: Step[ChoicePlan]) -> int:
    score = step.of.choice.score
    return in_memory.pieces(call, step) if score is not None and stands_in_memory(score) else choose.pieces(call, step)


_TURNS: dict[str, Callable[[Call, Step[Any]], int]] = {
    "": lambda call, step: 1,
    "heads": pairs.turns,
    "rows": _pieces,
}
_HOLDS: dict[When, Callable[[Call, Step[Any]], bool]] = {
    When.ENTRIES: _has_entries,
    When.ONE_ENTRY: lambda call, step: attempted(call, step.of) == 1,
    When.MORE_ENTRIES: lambda call, step: attempted(call, step.of) > 1,
    When.SPLITS: lambda call, step: choose.select_splits(call, step) > 1,
    When.JOBS: _has_jobs,
    When.OTHER_TILES: units.other_tiles,
    When.NOT_MADE: lambda call, step: False,  # with a cache all results are computed
    When.LEARNED: _is_learned,
    When.SHARED_KEYS: lambda call, step: divergence.shared(call, step.of),
}
