"""attend: the steps of one softmax over ranges or lists of blocks."""

from __future__ import annotations

from collections.abc import Iterator

from spdsl.ir.pattern import Values
from spdsl.ir.plan import SoftmaxPlan
from spdsl.ir.schedule import Buffer, Event, Kind, Stage, Step, When
from spdsl.passes.schedule.buffers import Buffers


def forward(room: Buffers, softmax: SoftmaxPlan) -> Iterator[Step[SoftmaxPlan]]:
    """Train and prefill."""
    own, result = _walked(room, softmax), room.result(softmax.name)
    if own is not softmax:
        yield Step(Kind.CLASSES, f"{own.name} order", softmax, reads=(room.query(softmax), *room.keys(softmax)))
    yield from _tiles(room, softmax, own, "forward")
    yield Step(
        Kind.FORWARD, f"{own.name}_forward", softmax, f"{own.name}_forward", str(own.rows), visit(own),
        (room.query(softmax), *room.keys(softmax), *room.reads(own.reads)),
        (*result, *room.notes(softmax)), (*result, *room.notes(softmax)),
        event=Event.CLOSED if room.cached else Event.CALLED, wanted=softmax.wanted, table="forward",
    )  # fmt: skip


def decode(room: Buffers, softmax: SoftmaxPlan) -> Iterator[Step[SoftmaxPlan]]:
    """One query of each sequence, the heads of a group as rows; whoever reads the result merges the splits."""
    yield Step(
        Kind.DECODE, f"{softmax.name}_decode", softmax, f"{softmax.name}_decode", "the heads of a group, one split",
        visit(softmax), (room.query(softmax), *room.keys(softmax), *room.reads(softmax.reads)),
        (*room.splits(softmax), *room.notes(softmax)),
        event=Event.CLOSED, wanted=softmax.wanted, table="decode",
    )  # fmt: skip


def backward(room: Buffers, softmax: SoftmaxPlan) -> Iterator[Step[SoftmaxPlan]]:
    """delta, dQ, and dK and dV of each stream: seven products of tiles for the five of the algorithm."""
    own, query = _walked(room, softmax), room.query(softmax)
    given = given_back(room, softmax)
    yield delta(room, softmax)
    yield from _tiles(room, softmax, own, "dq")
    gradient = (room.gradient(query),)
    yield Step(
        Kind.DQ, f"{own.name}_dq", softmax, f"{own.name}_dq", str(own.rows), visit(own),
        (query, *room.keys(softmax), *given), gradient, gradient, table="dq",
    )  # fmt: skip
    yield from _tiles(room, softmax, own, "dkdv")
    for i, sweep in enumerate(own.sweeps):
        name = own.name if len(own.sweeps) == 1 else f"{own.name}_{sweep.stream.name}"
        keys = room.stream_of(softmax, sweep.stream)
        gradients = room.gradients_of(softmax, sweep.stream)
        yield Step(
            Kind.DKDV, f"{name}_dkdv", softmax, f"{name}_dkdv", f"a block of {sweep.stream.name} of a key head",
            "tiles of queries of its group", (query, *keys, *given), gradients, gradients, index=i,
            when=When.ENTRIES, table="dkdv",
        )  # fmt: skip
    if own is not softmax:
        yield Step(Kind.CLASSES_BACK, f"{own.name} order, backward", softmax)
    yield from by_torch(room, softmax)


def delta(room: Buffers, softmax: SoftmaxPlan) -> Step[SoftmaxPlan]:
    out, lse = room.result(softmax.name)
    reads = (room.gradient(out), room.gradient(lse), out)
    return Step(
        Kind.DELTA, "row_delta", softmax, "row_delta", "neighbouring queries of a head", reads=reads,
        writes=(room.delta(softmax),),
    )  # fmt: skip


def given_back(room: Buffers, softmax: SoftmaxPlan) -> tuple[Buffer, ...]:
    """What a backward reads beside its inputs."""
    out, lse = room.result(softmax.name)
    return room.gradient(out), lse, room.delta(softmax), *room.notes(softmax)


def by_torch(room: Buffers, softmax: SoftmaxPlan) -> Iterator[Step[SoftmaxPlan]]:
    """What is left of a backward: dV where it is the front of dK, and the sink."""
    for i, sweep in enumerate(softmax.sweeps):
        if sweep.stream.value is Values.KEY:
            dk, dv = room.gradients_of(softmax, sweep.stream)
            yield Step(Kind.ADD_FRONT, f"{dv.name} added", softmax, reads=(dv,), writes=(dk,), index=i)
    if softmax.softmax.sink:
        yield Step(Kind.SINK_GRADIENT, f"{softmax.softmax.sink}, backward", softmax, reads=room.result(softmax.name))


def visit(softmax: SoftmaxPlan) -> str:
    """What a program walks of each stream."""
    return ", then ".join(f"{sweep.visit} of {sweep.stream.name}" for sweep in softmax.sweeps)


def _tiles(room: Buffers, softmax: SoftmaxPlan, own: SoftmaxPlan, table: str) -> Iterator[Step[SoftmaxPlan]]:
    """Full and partial blocks, listed by torch."""
    if own.maps:
        lists = room.made(f"{own.name}.{table} tiles", ("B", "H", "tiles", "blocks"), "int32", "all blocks")
        yield Step(
            Kind.TILES, f"{own.name} {table} tiles", softmax, reads=room.reads(own.reads), writes=(lists,), table=table
        )


def _walked(room: Buffers, softmax: SoftmaxPlan) -> SoftmaxPlan:
    """Whole sequences go by residue class where there is a step."""
    trains = room.stage in (Stage.FORWARD, Stage.BACKWARD)
    return softmax.of_class if softmax.of_class is not None and trains else softmax
