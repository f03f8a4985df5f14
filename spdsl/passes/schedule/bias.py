"""bias: the steps of the gradients of what a bias reads: an operator of its own, for the tensors that want one.

Each read has a kernel that makes the gradients of the logits again, and sums them where the read lies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from spdsl.ir.bias import BiasRead, Place
from spdsl.ir.plan import SoftmaxPlan
from spdsl.ir.schedule import Buffer, Kind, Step, When
from spdsl.passes.schedule.attend import delta, given_back, visit
from spdsl.passes.schedule.buffers import WIDE, Buffers
from spdsl.passes.schedule.units import unions_of, walked

Steps = Iterator[Step[SoftmaxPlan]]


def gradients(room: Buffers, softmax: SoftmaxPlan) -> Steps:
    """After the backward of all that is computed together: torch asks for these by themselves."""
    own = softmax.of_class or softmax
    if not own.learned_reads:
        return
    numbered = list(enumerate(own.learned_reads))
    tensors = dict.fromkeys(read.tensor for read in own.learned_reads)
    steps = [delta(room, softmax)]
    for tensor in tensors:
        for number, read in numbered:
            if read.tensor == tensor:
                steps += (
                    replace(step, part=f"{own.name} {number}") for step in _read(room, softmax, own, number, read)
                )
    yield from (replace(step, when=When.LEARNED) for step in steps)


def _read(room: Buffers, softmax: SoftmaxPlan, own: SoftmaxPlan, number: int, read: BiasRead) -> Steps:
    name, turns = f"{own.name}_dbias_{number}", "heads" if own.pairs else ""
    table = "units_dq" if own.units else "dkdv" if read.place is Place.KEY else "dq"
    lists = list(_lists(room, softmax, own, table, turns))
    yield from lists
    walked_lists = [buffer for step in lists for buffer in step.writes]
    given = (
        room.query(softmax),
        *room.keys(softmax),
        *given_back(room, softmax),
        *walked_lists,
        *room.reads(own.reads),
    )
    sums = _sums(room, softmax, own, name, read)
    of_keys = read.place is Place.KEY
    for i, sweep in enumerate(own.sweeps if of_keys else own.sweeps[:1]):
        stream = sweep.stream.name
        kernel = f"{own.name}_{stream}_dbias_{number}_keys" if of_keys and len(own.sweeps) > 1 else name
        kernel = f"{name}_keys" if of_keys and len(own.sweeps) == 1 else kernel
        rows = f"a block of {stream} of a key head" if of_keys else str(own.rows)
        yield Step(
            Kind.BIAS, kernel, softmax, kernel, rows, "tiles of queries of its group" if of_keys else visit(own),
            given, sums, sums, table=table, index=i, turns_of=turns,
        )  # fmt: skip
        if read.place is not Place.PAIR:
            yield Step(
                Kind.BIAS_SUMS, f"{kernel} by element", softmax, reads=sums,
                writes=(room.gradient(room.tensor(read.tensor)),), index=number, turns_of=turns,
            )  # fmt: skip


def _lists(room: Buffers, softmax: SoftmaxPlan, own: SoftmaxPlan, table: str, turns: str) -> Steps:
    """What the kernel walks, as the backward makes it."""
    if own.maps:
        lists = room.made(f"{own.name}.{table} tiles", ("B", "H", "tiles", "blocks"), "int32", "all blocks")
        yield Step(
            Kind.TILES, f"{own.name} {table} tiles", softmax, reads=room.reads(own.reads), writes=(lists,), table=table
        )
    elif own.units is not None:
        choice = walked(softmax)
        kind, what = (Kind.PAIRS, "pairs") if own.pairs else (Kind.UNIONS, "unions")
        pairs = room.made(f"{own.name}.pairs", (room.list_heads(choice), "queries x units"), "int32")
        lists = pairs if own.pairs else unions_of(room, own.name, choice)
        yield Step(
            kind, f"{own.name} {what} of its bias", softmax, reads=(room.list_of(choice),), writes=(lists,),
            table="units_dq" if what == "unions" else "", turns_of=turns,
        )  # fmt: skip


def _sums(room: Buffers, softmax: SoftmaxPlan, own: SoftmaxPlan, name: str, read: BiasRead) -> tuple[Buffer, ...]:
    """What the programs leave: their sums, and which elements these are of. A pair's element is its own."""
    if read.place is Place.PAIR:
        return (room.gradient(room.tensor(read.tensor)),)
    heads = room.query_heads(softmax)
    lists = room.list_heads(own.units) if own.units else heads
    programs: tuple[str, ...] = ("heads", "jobs") if own.pairs else ("B", lists, "tiles")
    in_rows = read.place is Place.ROW or (read.place is Place.HEAD and own.units is not None and not own.pairs)
    axes = ("B", heads, "M") if read.place is Place.KEY else ("B", heads, room.queries) if in_rows else programs
    entries = [str(read.tensor.axes[i]) for i in read.moving_axes] if read.place is Place.TABLE else []
    packed = [f"{heads} / lists"] if entries and own.units is not None and not own.pairs else []
    table = (" x ".join([*packed, *entries]),) if entries else ()
    return (
        room.made(f"{name}.sums", (*axes, *table), WIDE),
        room.made(f"{name}.places", (*axes, *packed), "int64"),
    )
