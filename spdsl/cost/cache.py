"""cache: what it costs to store new tokens, and to close the entries that they complete."""

from __future__ import annotations

from fractions import Fraction
from math import prod

from spdsl.cost.entries import entry_flops, sides_of, tokens_moved, weights_of
from spdsl.cost.kernels import INDEX_BYTES, Call, Kernel
from spdsl.ir.pattern import Phase, Query, Stream, Tensor
from spdsl.ir.schedule import Step
from spdsl.passes.count import Number

VALUE_BYTES = {"bool": 1, "int": 8, "float": 4}  # of token tensors in the cache
ROWS, COLUMNS, DEEP_BYTES = 16, 32, 256  # of a program that closes by `mlp`: sequences, columns, of a vector at once


def append_rows(call: Call, step: Step[None]) -> Kernel:
    each = sum(call.count.stream(stream)[0] * sum(sides_of(call, stream)) for stream in call.streams) * call.shape.size
    each += sum(VALUE_BYTES[tensor.dtype] * _numbers(call, tensor) for tensor in call.token_tensors)
    moved = call.many(2 * call.queries * each)
    return Kernel(step.name, "cache", "copy", bytes=moved, moved=moved)


def _numbers(call: Call, tensor: Tensor) -> int:
    """Of one token."""
    query = next(one for one in call.plan.pattern.inputs if isinstance(one, Query))
    known = {"head": query.heads or call.shape.heads, "kv_head": call.count.stream(call.streams[0])[0]}
    return prod(known.get(str(axis), axis if isinstance(axis, int) else 1) for axis in tensor.axes)


def append_lengths(call: Call, step: Step[None]) -> Kernel:
    counts = call.many(4 * INDEX_BYTES)  # lengths and dropped tokens, read and written
    return Kernel(step.name, "cache", "copy", bytes=counts, moved=counts)


def attempted(call: Call, stream: Stream) -> int:
    """How many entries of a sequence a call may close."""
    return -(-call.queries // stream.grid.stride)


def close_cells(call: Call, step: Step[Stream]) -> Kernel:
    """One kernel from tokens to entries; a step of decode is the average one, as in `close_hidden`."""
    stream = step.of
    assert stream.compress is not None
    sources, share = 1 if stream.compress.logits is None else 2, _share(call, stream)
    tokens = tokens_moved(call, stream, stream.grid.width * sources, 1)
    weights = weights_of(call, stream).once
    read = _part(tokens, share) + _part(weights, _any(share, call.shape.batch))
    moved = _part(tokens + weights * call.shape.batch, share)
    flops = _part(entry_flops(call, stream, 1), share)
    return Kernel(step.name, "compress", "forward", flops=flops, machine=flops, bytes=read, moved=moved)


def close_short(call: Call, step: Step[Stream]) -> Kernel:
    """The tokens of one cell of each sequence, taken together and pooled."""
    width = step.of.grid.width
    read, moved = (tokens_moved(call, step.of, tokens, 1) for tokens in (width, 3 * width))
    return Kernel(step.name, "compress", "copy", bytes=read, moved=moved)


# ---- torch makes entries of what one kernel takes together, another keeps what closed


def take_cells(call: Call, step: Step[Stream]) -> Kernel:
    cells = _cells(call, step.of)
    return Kernel(step.name, "compress", "copy", bytes=cells, moved=cells * 2)


def pool_cells(call: Call, step: Step[Stream]) -> Kernel:
    stream, entries = step.of, attempted(call, step.of)
    flops, made = entry_flops(call, stream, entries), tokens_moved(call, stream, 0, entries)
    weights, cells = weights_of(call, stream), _cells(call, stream)
    read, moved = cells + made + weights.once, cells + made + weights.by_torch
    return Kernel(step.name, "compress", "forward", flops=flops, machine=flops, bytes=read, moved=moved)


def put_entries(call: Call, step: Step[Stream]) -> Kernel:
    made = tokens_moved(call, step.of, 0, attempted(call, step.of))
    return Kernel(step.name, "compress", "copy", bytes=made, moved=made * 2)


def _cells(call: Call, stream: Stream) -> Number:
    return tokens_moved(call, stream, attempted(call, stream) * stream.grid.width, 0)


# ---- one entry at most: a hidden layer, then the entries
#
# A step of decode is the average one: a sequence closes an entry in one of `stride` steps, and whether it does is taken
# to be independent of the others. A block of sequences reads the weights if any of its own closes one.


def close_hidden(call: Call, step: Step[Stream]) -> Kernel:
    stream, width, hidden = step.of, step.of.grid.width, _hidden(call, step.of)
    weights = weights_of(call, stream)
    read = tokens_moved(call, stream, width, 0) + _inner(call, stream)
    products = sum(2 * (width * _deep(dim, call)) * _wide(hidden) for dim in sides_of(call, stream))  # and positions
    return _layer(call, step, width, read, weights.of("position", "up"), products)


def close_outputs(call: Call, step: Step[Stream]) -> Kernel:
    stream, hidden = step.of, _hidden(call, step.of)
    read = tokens_moved(call, stream, 0, 1) + _inner(call, stream)
    products = sum(_deep(hidden, call) * _wide(dim) for dim in sides_of(call, stream))
    return _layer(call, step, 1, read, weights_of(call, stream).of("down"), products)


def _layer(call: Call, step: Step[Stream], factor: int, vectors: Number, read: Number, products: int) -> Kernel:
    stream, batch = step.of, call.shape.batch
    share, heads, hidden = _share(call, stream), call.count.stream(stream)[0], _hidden(call, stream)
    blocks = [min(ROWS, batch - first) for first in range(0, batch, ROWS)]
    works, any_works = sum((_any(share, rows) for rows in blocks), Fraction(0)), _any(share, batch)
    flops = _part(call.many(heads * sum(2 * factor * dim * hidden for dim in sides_of(call, stream))), share)
    machine = _part(Number(2 * ROWS * heads * products), works)
    own = _part(vectors, share)
    return Kernel(
        step.name, "compress", "forward", flops=flops, machine=machine, bytes=own + _part(read, any_works),
        moved=own + _part(read, works),
    )  # fmt: skip


def _hidden(call: Call, stream: Stream) -> int:
    """As in `example_inputs`."""
    return 2 * call.count.stream(stream)[1]


def _inner(call: Call, stream: Stream) -> Number:
    """Bytes of the hidden layer of one entry of each sequence."""
    heads, sides = call.count.stream(stream)[0], sides_of(call, stream)
    return call.many(heads * _hidden(call, stream) * len(sides) * call.shape.size)


def _deep(numbers: int, call: Call) -> int:
    """Of a vector that is multiplied: as many as whole steps have."""
    step = max(16, min(DEEP_BYTES // call.shape.size, 1 << (numbers - 1).bit_length()))
    return -(-numbers // step) * step


def _wide(columns: int) -> int:
    return -(-columns // COLUMNS) * COLUMNS


def _share(call: Call, stream: Stream) -> Fraction:
    """How many entries a sequence closes in a call: in a step of decode on average."""
    if call.phase is Phase.DECODE:
        return Fraction(1, stream.grid.stride)
    return Fraction(call.count.entries(stream))


def _any(share: Fraction, rows: int) -> Fraction:
    """The probability that one of `rows` sequences closes an entry."""
    return 1 - (1 - min(Fraction(1), share)) ** rows


def _part(number: Number, share: Fraction) -> Number:
    return Number(round(number.value * share), number.exact)
