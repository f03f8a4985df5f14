"""entries: the steps that make the entries of compressed streams, and those that add new tokens to a cache."""

from __future__ import annotations

from collections.abc import Iterator

from spdsl.ir.pattern import Stream, Tensor
from spdsl.ir.plan import Plan
from spdsl.ir.pool import Closing, Pool
from spdsl.ir.schedule import Buffer, Event, Kind, Lifetime, Side, Stage, Step, When
from spdsl.passes.schedule.buffers import LIKE_Q, WIDE, Buffers, sides, source_of
from spdsl.primitives.pools import POOLS

CELLS, BLOCK = "the tokens of their cells", "a block of entries of a head"


def pool_of(stream: Stream) -> Pool:
    assert stream.compress is not None
    return POOLS[stream.compress.by]


def made(room: Buffers, stream: Stream) -> Iterator[Step[Side]]:
    """`attention` makes the entries of all tokens, keys and values apart: by a kernel, or by torch."""
    by_kernel = bool(pool_of(stream).backward)
    for name in sides(room.plan, stream):
        side, label = Side(stream, name), f"{stream.name} entries, {name}"
        reads, writes = (*_tokens(room, side), *room.weights(stream, name)), (room.side(stream, name),)
        if by_kernel:
            yield _over_entries(Kind.ENTRIES, label, side, "pool_entries", reads, writes)
        else:
            yield Step(Kind.ENTRIES, label, side, reads=reads, writes=writes)


def gradients(room: Buffers, stream: Stream) -> Iterator[Step[Side]]:
    """The last side that was made comes first."""
    for name in reversed(sides(room.plan, stream)):
        yield from _gradient(room, Side(stream, name))


def _gradient(room: Buffers, side: Side) -> Iterator[Step[Side]]:
    stream, label = side.stream, f"{side.stream.name} entries, {side.name}, backward"
    given: tuple[Buffer, ...] = (room.gradient(room.side(stream, side.name)),)
    tokens, weights = _tokens(room, side), f"{stream.name} weights, {side.name}"
    places = (room.made(f"{stream.name}.places", ("B", "heads", "E", "dim"), "int32"),)
    sums = (room.made(f"{stream.name}.sums", ("B", "heads", "programs", "width + dims"), WIDE),)
    for kernel in pool_of(stream).backward:
        if kernel == "pool_entries":
            name = f"{stream.name} places, {side.name}"
            yield _over_entries(Kind.FIND_MAXIMA, name, side, kernel, tokens, places)
            given = (*given, *places)
        elif kernel == "spread_entries":
            yield Step(
                Kind.SPREAD_ENTRIES, label, side, kernel, "a block of tokens of a head", "the entries that hold them",
                given, room.gradients(tokens),
            )  # fmt: skip
        else:
            yield _over_entries(Kind.WEIGHT_SUMS, weights, side, kernel, (*given, *tokens), sums)
            yield Step(Kind.WEIGHTS_BACK, f"{weights}, backward", side, reads=sums)
    if not pool_of(stream).backward:
        yield Step(Kind.SPREAD_ENTRIES, label, side, reads=given, writes=room.gradients(tokens))


def _over_entries(
    kind: Kind, name: str, side: Side, kernel: str, reads: tuple[Buffer, ...], writes: tuple[Buffer, ...]
) -> Step[Side]:
    return Step(kind, name, side, kernel, BLOCK, CELLS, reads, writes, when=When.ENTRIES)


def appended(room: Buffers) -> Iterator[Step[None]]:
    """New tokens are stored; then lengths count them."""
    inputs = room.plan.pattern.inputs
    streams = [stream for stream in inputs if isinstance(stream, Stream) and stream.compress is None]
    new = [(stream, name) for stream in streams for name in sides(room.plan, stream)]
    values = room.reads(tuple(tensor for tensor in inputs if isinstance(tensor, Tensor) and tensor.by_token))
    spans = (
        Buffer("cache.spans", ("B", "2"), "int32", Lifetime.CACHE),
        Buffer("cache.dropped", ("B",), "int32", Lifetime.CACHE),
    )
    yield Step(
        Kind.APPEND_ROWS, "append_rows", None, "append_rows", "new tokens of a head", "their places in pages",
        (spans[0], *(room.side(stream, name, made=True) for stream, name in new)),
        (*(room.side(stream, name) for stream, name in new), *values),
    )  # fmt: skip
    yield Step(
        Kind.APPEND_LENGTHS, "append_lengths", None, "append_lengths", "a sequence", "its pages", spans[:1], spans,
        event=Event.CALLED,
    )  # fmt: skip


def closed(room: Buffers, stream: Stream) -> Iterator[Step[Stream]]:
    """Entries that closed, from the cache and into it; a call of one query closes one entry at most."""
    names = sides(room.plan, stream)
    tokens = tuple(token for name in names for token in _tokens(room, Side(stream, name)))
    entries = tuple(room.side(stream, name) for name in names)
    closing, step, taken = pool_of(stream).closing, room.stage is Stage.DECODE, tokens
    if closing is Closing.STREAMED:
        cell = "the tokens of its cell"
        tokens = (*tokens, *_weights(room, stream))
        yield _step(Kind.CLOSE_CELLS, stream, "close_cells", "an entry of a head", cell, tokens, entries)
    elif closing is Closing.CELLS:
        yield from _by_cells(room, stream, tokens, entries, When.ALWAYS)
    else:
        if not step:
            yield from _by_cells(room, stream, tokens, entries, When.MORE_ENTRIES)
        yield from _by_layers(room, stream, tokens, entries, When.ALWAYS if step else When.ONE_ENTRY)
    if stream.grid.partial and not step:
        short = f"{stream.name}, the short cell"
        yield Step(Kind.CLOSE_SHORT, short, stream, reads=taken, writes=entries, event=Event.APPENDED)


def _by_cells(
    room: Buffers, stream: Stream, tokens: tuple[Buffer, ...], entries: tuple[Buffer, ...], when: When
) -> Iterator[Step[Stream]]:
    """A kernel takes cells together, torch makes entries of them, a kernel keeps those that closed."""
    cells = (room.made(f"{stream.name}.cells", ("B", "heads", "E", "width", "dim"), LIKE_Q),)
    new = (room.made(f"{stream.name}.new", ("B", "heads", "E", "dim"), LIKE_Q),)
    yield _step(Kind.TAKE_CELLS, stream, "take_cells", "neighbouring rows of cells", "pages", tokens, cells, when)
    pools = f"{stream.name} pools"
    reads = (*cells, *_weights(room, stream))
    yield Step(Kind.POOL_CELLS, pools, stream, reads=reads, writes=new, event=Event.APPENDED, when=when)
    yield _step(Kind.PUT_ENTRIES, stream, "put_entries", "neighbouring entries", "", new, entries, when)


def _by_layers(
    room: Buffers, stream: Stream, tokens: tuple[Buffer, ...], entries: tuple[Buffer, ...], when: When
) -> Iterator[Step[Stream]]:
    hidden = (room.made(f"{stream.name}.hidden", ("B", "heads", "hidden"), WIDE),)
    columns, closing = "columns of a layer for 16 sequences of a head", "the cells that close"
    weights = _weights(room, stream)
    down = tuple(weight for weight in weights if weight.name.endswith("_down"))
    up = tuple(weight for weight in weights if weight not in down)
    yield _step(Kind.CLOSE_HIDDEN, stream, "close_hidden", columns, closing, (*tokens, *up), hidden, when)
    yield _step(Kind.CLOSE_OUTPUTS, stream, "close_outputs", columns, closing, (*hidden, *down), entries, when)


def _weights(room: Buffers, stream: Stream) -> tuple[Buffer, ...]:
    """Of keys and of values."""
    return tuple(weight for name in sides(room.plan, stream) for weight in room.weights(stream, name))


def _step(
    kind: Kind, stream: Stream, kernel: str, rows: str, visit: str, reads: tuple[Buffer, ...],
    writes: tuple[Buffer, ...], when: When = When.ALWAYS
) -> Step[Stream]:  # fmt: skip
    return Step(kind, kernel, stream, kernel, rows, visit, reads, writes, event=Event.APPENDED, when=when)


def _tokens(room: Buffers, side: Side) -> tuple[Buffer, ...]:
    """Keys or values of the source, and those of the stream that weighs them."""
    stream, plan = side.stream, room.plan
    assert stream.compress is not None
    own = (Side(source_of(plan, stream), side.name), *weighing(plan, side))
    return tuple(room.side(own_side.stream, own_side.name) for own_side in own)


def weighing(plan: Plan, side: Side) -> tuple[Side, ...]:
    """Keys or values of the stream whose softmax weighs the tokens; its keys where it has no values."""
    compress = side.stream.compress
    if compress is None or compress.logits is None:
        return ()
    logits = plan.pattern.input(compress.logits)
    assert isinstance(logits, Stream)
    return (Side(logits, side.name if side.name in sides(plan, logits) else "k"),)
