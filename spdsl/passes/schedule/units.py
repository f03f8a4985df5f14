"""units: the steps of a softmax over the units of a choice: neighbouring queries outermost."""

from __future__ import annotations

from collections.abc import Iterator

from spdsl.ir.pattern import Choice
from spdsl.ir.plan import SoftmaxPlan
from spdsl.ir.schedule import Buffer, Event, Kind, Step, When
from spdsl.passes.schedule.attend import by_torch, delta, given_back
from spdsl.passes.schedule.buffers import WIDE, Buffers


def forward(room: Buffers, softmax: SoftmaxPlan) -> Iterator[Step[SoftmaxPlan]]:
    choice, result = walked(softmax), room.result(softmax.name)
    event = Event.CLOSED if room.cached else Event.CALLED
    unions = unions_of(room, softmax.name, choice)
    yield Step(
        Kind.UNIONS, f"{softmax.name} unions", softmax, reads=(room.list_of(choice),), writes=(unions,), event=event,
        wanted=softmax.wanted, table="units",
    )  # fmt: skip
    yield Step(
        Kind.UNIT_FORWARD, f"{softmax.name}_forward", softmax, f"{softmax.name}_forward", str(softmax.rows),
        f"the union of their units of {choice.name}",
        (room.query(softmax), *room.keys(softmax), unions, *room.reads(softmax.reads)), result, result, event=event,
        wanted=softmax.wanted, table="units",
    )  # fmt: skip


def decode(room: Buffers, softmax: SoftmaxPlan) -> Iterator[Step[SoftmaxPlan]]:
    choice = walked(softmax)
    yield Step(
        Kind.UNIT_DECODE, f"{softmax.name}_decode", softmax, f"{softmax.name}_decode", "the heads of a list, one split",
        f"its share of the units of {choice.name}",
        (room.query(softmax), *room.keys(softmax), room.list_of(choice), *room.reads(softmax.reads)),
        room.splits(softmax), event=Event.CLOSED, wanted=softmax.wanted, table="units_decode",
    )  # fmt: skip


def backward(room: Buffers, softmax: SoftmaxPlan) -> Iterator[Step[SoftmaxPlan]]:
    choice, query, keys = walked(softmax), room.query(softmax), room.keys(softmax)
    given, unions = given_back(room, softmax), unions_of(room, softmax.name, choice)
    dq, gradients = (room.gradient(query),), room.key_gradients(softmax)
    yield delta(room, softmax)
    yield Step(
        Kind.UNIONS,
        f"{softmax.name} unions",
        softmax,
        reads=(room.list_of(choice),),
        writes=(unions,),
        table="units_dq",
    )
    yield Step(
        Kind.UNIT_DQ, f"{softmax.name}_dq", softmax, f"{softmax.name}_dq", str(softmax.rows),
        f"the union of their units of {choice.name}", (query, *keys, *given, unions), dq, dq, table="units_dq",
    )  # fmt: skip
    inverse, slots = inverse_of(room, softmax.name, choice), slots_of(room, softmax.name)
    yield Step(
        Kind.UNIONS, f"{softmax.name} unions of dk, dv", softmax, reads=(room.list_of(choice),), writes=(unions,),
        when=When.OTHER_TILES, table="units_dkdv",
    )  # fmt: skip
    yield Step(
        Kind.INVERSE, f"{softmax.name} inverse lists", softmax, reads=(unions,), writes=(inverse,), table="units_dkdv"
    )
    yield Step(
        Kind.UNIT_DKDV, f"{softmax.name}_dkdv", softmax, f"{softmax.name}_dkdv",
        "a block of a unit of a key head, one job", "the tiles that chose the unit",
        (query, *keys, *given, inverse), (*gradients, slots), gradients,
        table="units_dkdv",
    )  # fmt: skip
    yield add_slots(softmax, inverse, slots, gradients)
    yield from by_torch(room, softmax)


def add_slots(softmax: SoftmaxPlan, lists: Buffer, slots: Buffer, gradients: tuple[Buffer, ...]) -> Step[SoftmaxPlan]:
    return Step(
        Kind.ADD_SLOTS, "add_slots", softmax, "add_slots", "a block of a unit of a key head", "its jobs, in order",
        (slots, lists), gradients, when=When.JOBS, table="units_dkdv",
    )  # fmt: skip


def walked(softmax: SoftmaxPlan) -> Choice:
    assert softmax.units is not None
    return softmax.units


def unions_of(room: Buffers, name: str, choice: Choice) -> Buffer:
    """Units of each tile, with a bit for each of its queries that chose the unit."""
    most = f"units <= queries of a tile x {choice.capacity}" if choice.capacity else ""
    return room.made(f"{name}.unions", (room.list_heads(choice), "tiles", "units"), "int32, 64", most)


def inverse_of(room: Buffers, name: str, choice: Choice) -> Buffer:
    """The tiles of each unit, in jobs of bounded length."""
    return room.made(f"{name}.inverse", (room.list_heads(choice), "tiles x units"), "int32, 64")


def slots_of(room: Buffers, name: str) -> Buffer:
    return room.made(
        f"{name}.slots", ("Hkv", "slots", "unit x dims"), WIDE, "slots <= 2 x tiles x units / tiles of a job"
    )
