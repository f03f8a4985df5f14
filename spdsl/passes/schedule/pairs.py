"""pairs: the steps of a softmax over the units of a choice whose keys are outermost.

Each unit meets the queries that chose it; their parts of results are merged or added. Heads go one after the other
where the parts of all of them would need too much memory.
"""

from __future__ import annotations

from collections.abc import Iterator

from spdsl.ir.pattern import Choice
from spdsl.ir.plan import SoftmaxPlan
from spdsl.ir.schedule import Buffer, Event, Kind, Step
from spdsl.ir.visit import TILE
from spdsl.passes.schedule.attend import by_torch, delta, given_back
from spdsl.passes.schedule.buffers import WIDE, Buffers
from spdsl.passes.schedule.units import add_slots, slots_of, walked

VISIT = "that unit"
MERGED, PARTS = str(TILE), "their parts"


def forward(room: Buffers, softmax: SoftmaxPlan) -> Iterator[Step[SoftmaxPlan]]:
    choice, result = walked(softmax), room.result(softmax.name)
    event = Event.CLOSED if room.cached else Event.CALLED
    pairs = _pairs(room, softmax, choice)
    parts = tuple(_of_pairs(room, f"{softmax.name}.{name}", axes) for name, axes in (("parts", ("Dv",)), ("lses", ())))
    yield Step(
        Kind.PAIRS, f"{softmax.name} pairs", softmax, reads=(room.list_of(choice),), writes=(pairs,), event=event,
        turns_of="heads",
    )  # fmt: skip
    yield Step(
        Kind.PAIR_FORWARD, f"{softmax.name}_forward", softmax, f"{softmax.name}_forward", str(softmax.rows), VISIT,
        (room.query(softmax), *room.keys(softmax), pairs, *room.reads(softmax.reads)), parts,
        event=event, turns_of="heads", table="units",
    )  # fmt: skip
    yield Step(
        Kind.MERGE_PAIRS, "merge_pairs", softmax, "merge_pairs", MERGED, PARTS, (*parts, pairs), result, result,
        event=event, turns_of="heads",
    )  # fmt: skip


def backward(room: Buffers, softmax: SoftmaxPlan) -> Iterator[Step[SoftmaxPlan]]:
    choice, query, keys = walked(softmax), room.query(softmax), room.keys(softmax)
    given, pairs = given_back(room, softmax), _pairs(room, softmax, choice)
    dq, gradients = (room.gradient(query),), room.key_gradients(softmax)
    parts, slots = _of_pairs(room, f"{softmax.name}.dq parts", ("Dqk",)), slots_of(room, softmax.name)
    chosen = (room.list_of(choice),)
    yield delta(room, softmax)
    yield Step(Kind.PAIRS, f"{softmax.name} pairs", softmax, reads=chosen, writes=(pairs,), turns_of="heads")
    yield Step(
        Kind.PAIR_DQ, f"{softmax.name}_dq", softmax, f"{softmax.name}_dq", str(softmax.rows), VISIT,
        (query, *keys, *given, pairs), (parts,), turns_of="heads", table="units_dq",
    )  # fmt: skip
    yield Step(
        Kind.ADD_PAIRS, "add_pairs", softmax, "add_pairs", MERGED, PARTS, (parts, pairs), dq, dq,
        turns_of="heads",
    )  # fmt: skip
    yield Step(Kind.PAIRS, f"{softmax.name} pairs of dk, dv", softmax, reads=chosen, writes=(pairs,))
    yield Step(
        Kind.PAIR_DKDV, f"{softmax.name}_dkdv", softmax, f"{softmax.name}_dkdv",
        "a block of a unit of a key head, one job", "the queries of its heads that chose the unit",
        (query, *keys, *given, pairs), (*gradients, slots), gradients, table="units_dkdv",
    )  # fmt: skip
    yield add_slots(softmax, pairs, slots, gradients)
    yield from by_torch(room, softmax)


def _pairs(room: Buffers, softmax: SoftmaxPlan, choice: Choice) -> Buffer:
    """Pairs of a query and a unit, sorted by unit, in jobs."""
    return room.made(f"{softmax.name}.pairs", (room.list_heads(choice), "queries x units"), "int32")


def _of_pairs(room: Buffers, name: str, axes: tuple[str, ...]) -> Buffer:
    return room.made(name, ("heads", "pairs", *axes), WIDE, "heads x pairs <= what PARTS_BYTES hold")
