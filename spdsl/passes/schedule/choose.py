"""choose: the steps that make the lists of a choice."""

from __future__ import annotations

from collections.abc import Iterator

from spdsl.ir.pattern import Choice, in_memory, softmaxes_of
from spdsl.ir.plan import ChoicePlan, Plan, SoftmaxPlan
from spdsl.ir.schedule import Buffer, Event, Kind, Stage, Step, When
from spdsl.passes.schedule.buffers import Buffers
from spdsl.passes.schedule.query_cells import spread_lists
from spdsl.passes.selection import ranked


def mapped(room: Buffers) -> Iterator[Step[Choice]]:
    """Units that the caller gives, or that are drawn: maps, which tests look up, and lists, which kernels walk."""
    event = Event.CLOSED if room.cached else Event.CALLED
    for choice in room.plan.pattern.inputs:
        if isinstance(choice, Choice) and not (choice.listed or choice.selected):
            writes = room.reads((choice,))
            yield Step(Kind.MAP, f"{choice.name} map", choice, reads=room.given(choice), writes=writes, event=event)
        elif isinstance(choice, Choice) and choice.given:
            writes = (room.list_of(choice),)
            yield Step(Kind.SORT, f"{choice.name} sorted", choice, reads=room.given(choice), writes=writes, event=event)


def choose(room: Buffers, plan: ChoicePlan) -> Iterator[Step[ChoicePlan] | Step[Choice]]:
    """The lists of a choice; those of tiles become a map."""
    yield from _lists(room, plan)
    choice, event = plan.choice, Event.CLOSED if room.cached else Event.CALLED
    if choice.tiled:
        reads, writes = (room.list_of(choice),), room.reads((choice,))
        yield Step(Kind.MAP, f"{choice.name} map", choice, reads=reads, writes=writes, event=event)


def _lists(room: Buffers, plan: ChoicePlan) -> Iterator[Step[ChoicePlan]]:
    """A kernel scores and ranks in one pass; of lists that are too long for it scores are kept, and cut by another."""
    choice, softmax = plan.choice, scoring(room, plan)
    assert choice.score is not None
    event, step = Event.CLOSED if room.cached else Event.CALLED, room.stage is Stage.DECODE
    own = choice.score.probability and not in_memory(choice.score)
    lse = (room.splits(softmax) if step else room.result(softmax.name))[1:] if own else ()
    limits, sets = room.limits(choice), room.sets(plan)
    if sets:
        asked = room.reads(plan.asked)
        yield Step(Kind.SETS, f"{choice.name} sets", plan, reads=asked, writes=sets, event=event)
    if limits:
        yield Step(
            Kind.LIMITS, f"{choice.name} limits", plan, reads=room.reads(plan.at_call), writes=limits, event=event
        )  # fmt: skip
    reads = (room.query(softmax), room.keys(softmax)[0], *room.reads(plan.reads), *lse)
    name, found = f"{choice.name}_select", (room.list_of_rows(choice),)
    rows = "a share of the units" if step else "neighbouring queries of a list head"
    visit = "all units that may be chosen"
    if in_memory(choice.score):
        yield from _in_memory(room, plan, event, limits)
        return
    if not ranked(choice):
        axes = (room.list_heads(choice), "rows", f"M / {choice.unit}")
        scores = (room.made(f"{choice.name}.scores", axes, "int32", "rows by CUT_BYTES"),)
        reads = (*reads, *limits, *sets)
        yield Step(
            Kind.SCORE_UNITS, name, plan, name, rows, visit, reads, scores, event=event, table="select",
            turns_of="rows",
        )  # fmt: skip
        yield Step(
            Kind.CUT, "cut_lists", plan, "cut_lists", "a list", "the scores of its row", (*scores, *limits), found,
            found if choice.one_for_tile else (), event=event, turns_of="rows",
        )  # fmt: skip
        yield from spread_lists(room, plan)
        return
    ranks = _ranks(room, plan)
    yield Step(
        Kind.SELECT, name, plan, name, rows, visit, (*reads, *limits), (*found, ranks) if step else found, event=event,
        table="select",
    )  # fmt: skip
    if step:
        yield Step(
            Kind.MERGE_RANKS, "merge_ranks", plan, "merge_ranks", "a list", "the ranks of its programs",
            (ranks, *limits), found, event=event, when=When.SPLITS,
        )  # fmt: skip
    yield from spread_lists(room, plan)


def _in_memory(room: Buffers, plan: ChoicePlan, event: Event, limits: tuple[Buffer, ...]) -> Iterator[Step[ChoicePlan]]:
    """A kernel for the products of each softmax of the score; torch makes scores of units, and a kernel cuts lists."""
    choice = plan.choice
    assert choice.score is not None
    cells, made = choice.score.grain.cells, []
    for i, softmax in enumerate(scorings(room.plan, plan)):
        axes = (
            room.query_heads(softmax),
            "rows",
            f"M / {choice.score.grain.grid(softmax.sweeps[0].stream.grid).stride}",
        )
        made.append(room.made(f"{softmax.name}.products", axes, "float32", "rows by CUT_BYTES"))
        yield Step(
            Kind.MULTIPLY_CELLS, "multiply_cells", plan, "multiply_cells",
            "cells of queries of a head" if cells > 1 else "queries of a head",
            "a block of cells of keys" if cells > 1 else "a block of entries",
            (room.query(softmax), room.keys(softmax)[0]), (made[-1],), event=event, index=i, turns_of="rows",
        )  # fmt: skip
    axes = (room.list_heads(choice), "rows", f"M / {choice.unit}")
    scores = (room.made(f"{choice.name}.scores", axes, "int32", "rows by CUT_BYTES"),)
    yield Step(
        Kind.SCORES_OF_UNITS, f"{choice.name} scores", plan, reads=(*made, *limits, *room.reads(plan.reads)),
        writes=scores, event=event, turns_of="rows",
    )  # fmt: skip
    yield Step(
        Kind.CUT, "cut_lists", plan, "cut_lists", "a list", "the scores of its row", (*scores, *limits),
        (room.list_of(choice),), event=event, turns_of="rows",
    )  # fmt: skip


def scorings(plan: Plan, of: ChoicePlan) -> tuple[SoftmaxPlan, ...]:
    """The softmaxes whose logits a score is made of."""
    assert of.choice.score is not None
    by_name = {one.name: one for one in plan.softmaxes}
    return tuple(by_name[softmax.name] for softmax in softmaxes_of(of.choice.score))


def scoring(room: Buffers, plan: ChoicePlan) -> SoftmaxPlan:
    """The softmax whose logits are the score."""
    assert plan.choice.score is not None
    name = plan.choice.score.softmax.name
    return next(one for one in room.plan.softmaxes if one.name == name)


def _ranks(room: Buffers, plan: ChoicePlan) -> Buffer:
    heads, most = room.list_heads(plan.choice), f"ranks <= {plan.choice.capacity}, to a power of two"
    return room.made(f"{plan.choice.name}.ranks", ("B", heads, "splits", "ranks"), "int64", most)
