"""query_cells: the steps by which queries become other rows, and what rows have becomes that of their queries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from spdsl.ir.pattern import Branch, Query, Softmax
from spdsl.ir.plan import ChoicePlan, SoftmaxPlan
from spdsl.ir.schedule import Event, Kind, Stage, Step
from spdsl.passes.schedule.buffers import Buffers


def pooled(room: Buffers) -> Iterator[Step[Query]]:
    """A row for each cell, or the last queries, and where the rows lie."""
    event = Event.CLOSED if room.cached else Event.CALLED
    for query in room.plan.pattern.inputs:
        if isinstance(query, Query) and query.source is not None:
            reads, writes = (room.vectors(room.source(query)),), (room.vectors(query),)
            yield Step(Kind.POOL_QUERIES, f"{query.name} pooled", query, reads=reads, writes=writes, event=event)


def gradients(room: Buffers, softmaxes: Sequence[SoftmaxPlan]) -> Iterator[Step[Query]]:
    """Of the queries whose rows learn from a softmax; the last one that was made comes first."""
    for query in reversed(learning(room, softmaxes)):
        reads, writes = room.gradients((room.vectors(query),)), room.gradients((room.vectors(room.source(query)),))
        yield Step(Kind.POOL_QUERIES_BACK, f"{query.name} pooled, backward", query, reads=reads, writes=writes)


def learning(room: Buffers, softmaxes: Sequence[SoftmaxPlan]) -> list[Query]:
    asking = {softmax.softmax.query for softmax in softmaxes}
    inputs = room.plan.pattern.inputs
    return [one for one in inputs if isinstance(one, Query) and one.source is not None and one.name in asking]


def spread_lists(room: Buffers, plan: ChoicePlan) -> Iterator[Step[ChoicePlan]]:
    """A list for each query, as kernels walk them. One query has that of its cell."""
    choice = plan.choice
    if choice.grain > 1 and choice.listed and room.stage is not Stage.DECODE:
        yield Step(
            Kind.SPREAD_ROWS, f"{choice.name} of queries", plan, reads=(room.list_of_rows(choice),),
            writes=(room.list_of(choice),), event=Event.CLOSED if room.cached else Event.CALLED,
        )  # fmt: skip


def spread(room: Buffers, result: Branch) -> Iterator[Step[SoftmaxPlan]]:
    """The parts of a result that rows of cells have. One query has that of its cell."""
    event = Event.ATTENDED if room.cached else Event.CALLED
    for softmax in _of_cells(room, result):
        reads, writes = room.result(softmax.name), room.of_queries(softmax.name)
        yield Step(
            Kind.SPREAD_ROWS, f"{softmax.name} of queries", softmax, reads=reads, writes=writes, event=event
        )  # fmt: skip


def gathered(room: Buffers, result: Branch) -> Iterator[Step[SoftmaxPlan]]:
    """The gradients of rows: sums over their queries."""
    for softmax in reversed(_of_cells(room, result)):
        reads, writes = room.gradients(room.of_queries(softmax.name)), room.gradients(room.result(softmax.name))
        name = f"{softmax.name} of queries, backward"
        yield Step(Kind.SPREAD_ROWS_BACK, name, softmax, reads=reads, writes=writes)


def _of_cells(room: Buffers, result: Branch) -> list[SoftmaxPlan]:
    if room.stage is Stage.DECODE:
        return []
    names = [softmax.name for softmax in _softmaxes(result) if softmax.rows > 1]
    return [one for name in names for one in room.plan.softmaxes if one.name == name]


def _softmaxes(result: Branch) -> Iterator[Softmax]:
    if isinstance(result, Softmax):
        yield result
    else:
        for inner in result.branches:
            yield from _softmaxes(inner)
