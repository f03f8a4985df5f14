"""extras: the steps of further results: divergences whose kernels walk lists, and what torch computes."""

from __future__ import annotations

from collections.abc import Iterator

from spdsl.ir.pattern import Extra, Kl, Pooled
from spdsl.ir.plan import Plan, SoftmaxPlan
from spdsl.ir.schedule import Buffer, Kind, Scores, Step, Walk, When
from spdsl.ir.visit import PACKED
from spdsl.passes.divergence import list_of, walked_by
from spdsl.passes.schedule.buffers import WIDE, Buffers
from spdsl.passes.schedule.units import inverse_of, unions_of


def extra_of(plan: Plan, number: int, extra: Extra) -> Walk | Scores | None:
    """What a further value of a result is; None for a branch."""
    plans = {one.name: one for one in plan.softmaxes}
    if isinstance(extra, Pooled):
        side = plans[extra.score.softmax.name]
        return Scores(f"{side.name} as a result", (side,))
    if not isinstance(extra, Kl):
        return None
    target, score = (plans[side.score.softmax.name] for side in (extra.target, extra.score))
    if walked := walked_by(extra, target, score):
        return Walk(f"result_{number}", target, score, walked)
    return Scores(f"kl({target.name}, {score.name})", (target, score), list_of(extra, target, score))


def forward(room: Buffers, found: Walk | Scores) -> Iterator[Step[Walk] | Step[Scores]]:
    if isinstance(found, Scores):
        yield Step(Kind.SCORES, found.name, found, reads=_inputs(room, found.sides))
        return
    unions = unions_of(room, found.name, found.choice)
    yield _unions(room, found, unions)
    sums = tuple(room.per_list(f"{found.name}.{name}", found.choice) for name in ("kl", "total", "norm"))
    yield Step(
        Kind.DIVERGENCE, f"_{found.name}_forward", found, f"_{found.name}_forward", str(PACKED),
        f"the union of their units of {found.choice.name}", (*_given(room, found), unions), sums, sums,
        table="units_dq",
    )  # fmt: skip


def backward(room: Buffers, found: Walk | Scores) -> Iterator[Step[Walk] | Step[Scores]]:
    """Of a divergence the score alone learns."""
    if isinstance(found, Scores):
        yield Step(Kind.SCORES_BACK, f"{found.name}, backward", found, reads=_inputs(room, found.sides))
        return
    unions, inverse = (make(room, found.name, found.choice) for make in (unions_of, inverse_of))
    sums = tuple(room.per_list(f"{found.name}.{name}", found.choice) for name in ("dkl", "total", "norm"))
    dq = (room.gradient(room.query(found.score)),)
    heads = room.list_heads(found.choice)
    parts = (room.made(f"{found.name}.dk of lists", ("B", heads, "M", "Dqk"), WIDE),)
    slots = (room.made(f"{found.name}.slots", (heads, "slots", "unit x dim"), WIDE),)
    yield _unions(room, found, unions)
    yield Step(
        Kind.DIVERGENCE_DQ, f"_{found.name}_dq", found, f"_{found.name}_dq", str(PACKED),
        f"the union of their units of {found.choice.name}", (*_given(room, found), *sums, unions), dq, dq,
        table="units_dq",
    )  # fmt: skip
    yield _unions(room, found, unions, again=True)
    yield Step(
        Kind.INVERSE, f"_{found.name} inverse lists", found, reads=(unions,), writes=(inverse,), table="units_dkdv"
    )
    yield Step(
        Kind.DIVERGENCE_DK, f"_{found.name}_dk", found, f"_{found.name}_dk",
        "a block of a unit of a list head, one job", "the tiles that chose the unit",
        (*_given(room, found), *sums, inverse), (*parts, *slots), parts, table="units_dkdv",
    )  # fmt: skip
    yield Step(
        Kind.ADD_KEY_SLOTS, "add_key_slots", found, "add_key_slots", "a block of a unit of a list head",
        "its jobs, in order", (*slots, inverse), parts, when=When.JOBS, table="units_dkdv",
    )  # fmt: skip
    keys = room.gradients(room.keys(found.score)[:1])
    yield Step(Kind.KEY_PARTS, f"_{found.name} parts", found, reads=parts, writes=keys, when=When.SHARED_KEYS)


def _unions(room: Buffers, walk: Walk, unions: Buffer, again: bool = False) -> Step[Walk]:
    name = f"_{walk.name} unions{' of dk' if again else ''}"
    when, table = (When.OTHER_TILES, "units_dkdv") if again else (When.ALWAYS, "units_dq")
    return Step(Kind.UNIONS, name, walk, reads=(room.list_of(walk.choice),), writes=(unions,), when=when, table=table)


def _given(room: Buffers, walk: Walk) -> tuple[Buffer, ...]:
    return (*_inputs(room, (walk.target, walk.score)), room.result(walk.target.name)[1])


def _inputs(room: Buffers, sides: tuple[SoftmaxPlan, ...]) -> tuple[Buffer, ...]:
    return tuple(one for side in sides for one in (room.query(side), room.keys(side)[0], *room.reads(side.reads)))
