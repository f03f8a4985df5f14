"""sums: what a backward adds up: the gradients that several of its parts have of one tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from spdsl.ir.bias import BiasRead
from spdsl.ir.pattern import Case, Extra, Gate, Merge, Softmax, Stream, Values
from spdsl.ir.plan import SoftmaxPlan
from spdsl.ir.schedule import Buffer, Gradient, Kind, Side, Step, When
from spdsl.passes.joint import leaves
from spdsl.passes.schedule.buffers import Buffers, sides, source_of
from spdsl.passes.schedule.entries import weighing
from spdsl.passes.schedule.query_cells import learning
from spdsl.passes.schedule.results import is_joint


def summed(
    room: Buffers, case: Case, softmaxes: Sequence[SoftmaxPlan], entries: Sequence[Stream]
) -> Iterator[Step[tuple[Gradient, ...]]]:
    """One step for all of them: they are added as they come."""
    gradients = [gradient for result in (case.branch, *case.extras) for gradient in _of_result(room, result, softmaxes)]
    gradients += [Gradient(str(query.source)) for query in learning(room, softmaxes)]
    gradients += [gradient for softmax in softmaxes for gradient in _of_softmax(softmax)]
    gradients += [gradient for stream in entries for gradient in _of_entries(room, stream)]
    if again := _again(gradients):
        reads = tuple(buffer for gradient in again if (buffer := _buffer(room, gradient)) is not None)
        yield Step(Kind.SUMS, "sums of gradients", again, reads=reads, writes=reads)
    tensors = [tensor for softmax in softmaxes for tensor in dict.fromkeys(x.tensor for x in _walked_reads(softmax))]
    if of_biases := _again([Gradient(tensor.name) for tensor in tensors]):
        names = {gradient.name for gradient in of_biases}
        own = tuple(room.gradient(room.tensor(x)) for x in dict.fromkeys(tensors) if x.name in names)
        yield Step(Kind.SUMS, "sums of gradients of biases", of_biases, reads=own, writes=own, when=When.LEARNED)


def _again(gradients: Sequence[Gradient]) -> tuple[Gradient, ...]:
    """Those that come to one that is there."""
    return tuple(one for i, one in enumerate(gradients) if one.name in {other.name for other in gradients[:i]})


def _walked_reads(softmax: SoftmaxPlan) -> tuple[BiasRead, ...]:
    return (softmax.of_class or softmax).learned_reads


def _of_result(room: Buffers, result: Extra, softmaxes: Sequence[SoftmaxPlan]) -> Iterator[Gradient]:
    """The outputs that a result reads; those of a joint by its first part, for they are read together."""
    if isinstance(result, Gate):
        yield Gradient("gates")
        for branch in result.branches:
            yield from _of_result(room, branch, softmaxes)
    elif isinstance(result, Softmax | Merge):
        names = leaves(result)
        for softmax in softmaxes:
            if softmax.name in (names[:1] if is_joint(room, result) else names):
                yield Gradient(f"{softmax.name}.out", softmax)


def _of_softmax(softmax: SoftmaxPlan) -> Iterator[Gradient]:
    yield Gradient(softmax.softmax.query, softmax)
    if softmax.softmax.sink:
        yield Gradient(softmax.softmax.sink, softmax)
    for sweep in softmax.sweeps:
        for name in ("k", "v") if sweep.stream.value is Values.OWN else ("k",):
            yield Gradient(f"{name} of {sweep.stream.name}", side=Side(sweep.stream, name))


def _of_entries(room: Buffers, stream: Stream) -> Iterator[Gradient]:
    """They hand on what they get to the tokens that they are made of."""
    for name in sides(room.plan, stream):
        side = Side(source_of(room.plan, stream), name)
        for own in (side, *weighing(room.plan, Side(stream, name))):
            yield Gradient(f"{own.name} of {own.stream.name}", side=own)


def _buffer(room: Buffers, gradient: Gradient) -> Buffer | None:
    """None for gates and sinks."""
    softmax, side = gradient.softmax, gradient.side
    if side is not None:
        return room.gradient(room.side(side.stream, side.name))
    if softmax is None or gradient.name == softmax.softmax.sink:
        return None
    output = gradient.name == f"{softmax.name}.out"
    return room.gradient(room.result(softmax.name)[0] if output else room.query(softmax))
