"""entries: what making entries costs: their products, the weights of their pools, and closing them in a cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import prod

from spdsl.cost.kernels import Call, Kernel
from spdsl.ir.pattern import Phase, Stream, Values
from spdsl.ir.pool import Closing, Pool
from spdsl.passes.count import Number
from spdsl.primitives.pools import POOLS

ROWS, COLUMNS, DEEP_BYTES = (
    16,
    32,
    256,
)  # of a program of a network: sequences, columns, of a vector at once


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of the weights of a stream's pools by their roles, in the dtype of the call."""

    roles: dict[str, int]
    twice: tuple[str, ...]  # what torch reads twice

    def of(self, *roles: str) -> Number:
        return Number(sum(self.roles[role] for role in roles))

    @property
    def once(self) -> Number:
        return self.of(*self.roles)

    @property
    def by_torch(self) -> Number:
        return self.once + self.of(*self.twice)


def pool_of(stream: Stream) -> Pool:
    assert stream.compress is not None
    return POOLS[stream.compress.by]


def weights_of(call: Call, stream: Stream) -> Weights:
    """A network has 2 qk hidden numbers, as in `example_inputs`."""
    pool, dims, (heads, qk, _) = pool_of(stream), sides_of(call, stream), call.count.stream(stream)
    sizes = [{"heads": heads, "width": stream.grid.width, "dim": dim, "hidden": 2 * qk} for dim in dims]
    roles = {role: sum(prod(each[axis] for axis in axes) for each in sizes) for role, axes in pool.weights}
    return Weights({role: count * call.shape.size for role, count in roles.items()}, pool.twice)


def closed(call: Call, stream: Stream) -> Iterator[Kernel]:
    """Entries that closed, from the cache and into it."""
    attempted, closing = -(-call.queries // stream.grid.stride), pool_of(stream).closing
    if closing is Closing.STREAMED:
        yield _by_kernel(call, stream)
    elif closing is Closing.CELLS or attempted > 1:
        yield from _by_cells(call, stream, attempted)
    else:
        yield from _by_network(call, stream)


def _by_kernel(call: Call, stream: Stream) -> Kernel:
    """One kernel from tokens to entries; a step of decode is the average one, as in `_by_network`."""
    assert stream.compress is not None
    sources, share = 1 if stream.compress.logits is None else 2, _share(call, stream)
    tokens = tokens_moved(call, stream, stream.grid.width * sources, 1)
    weights = weights_of(call, stream).once
    read = _part(tokens, share) + _part(weights, _any(share, call.shape.batch))
    moved = _part(tokens + weights * call.shape.batch, share)
    flops = _part(entry_flops(call, stream, 1), share)
    return Kernel("close_cells", "compress", "forward", 1, 0, flops, flops, bytes=read, moved=moved)


def _by_cells(call: Call, stream: Stream, entries: int) -> Iterator[Kernel]:
    """Torch makes entries of what one kernel takes together, another keeps what closed."""
    cells = tokens_moved(call, stream, entries * stream.grid.width, 0)
    yield Kernel("take_cells", "compress", "copy", bytes=cells, moved=cells * 2)
    flops, made = entry_flops(call, stream, entries), tokens_moved(call, stream, 0, entries)
    weights, torch = weights_of(call, stream), pool_of(stream).operators
    assert torch is not None
    steps = (
        torch.closing + torch.closing_clipped * stream.grid.is_clipped - torch.closing_alone * (call.shape.batch == 1)
    )
    yield Kernel(
        f"{stream.name} pools", "compress", "forward", 0, steps * len(sides_of(call, stream)), flops, flops,
        bytes=cells + made + weights.once, moved=cells + made + weights.by_torch,
    )  # fmt: skip
    yield Kernel("put_entries", "compress", "copy", bytes=made, moved=made * 2)


def _by_network(call: Call, stream: Stream) -> Iterator[Kernel]:
    """The two kernels where a sequence closes one entry at most: a hidden layer, then the entries.

    A step of decode is the average one: a sequence closes an entry in one of `stride` steps, and whether it does is
    taken to be independent of the others. A block of sequences reads the weights if any of its own closes one.
    """
    share, batch = _share(call, stream), call.shape.batch
    blocks = [min(ROWS, batch - first) for first in range(0, batch, ROWS)]
    works, any_works = sum((_any(share, rows) for rows in blocks), Fraction(0)), _any(share, batch)
    heads, qk, _ = call.count.stream(stream)
    weights, dims, width, hidden = weights_of(call, stream), sides_of(call, stream), stream.grid.width, 2 * qk
    inner = call.many(heads * hidden * len(dims) * call.shape.size)
    steps = (
        ("close_hidden", width, tokens_moved(call, stream, width, 0) + inner, weights.of("position", "up"),
         sum(2 * (width * _deep(dim, call)) * _wide(hidden) for dim in dims)),  # tokens and positions
        ("close_outputs", 1, tokens_moved(call, stream, 0, 1) + inner, weights.of("down"),
         sum(_deep(hidden, call) * _wide(dim) for dim in dims)),
    )  # fmt: skip
    for name, factor, vectors, read, products in steps:
        flops = _part(call.many(heads * sum(2 * factor * dim * hidden for dim in dims)), share)
        machine = _part(Number(2 * ROWS * heads * products), works)
        own = _part(vectors, share)
        yield Kernel(
            name, "compress", "forward", 1, 0, flops, machine,
            bytes=own + _part(read, any_works), moved=own + _part(read, works),
        )  # fmt: skip


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


def sides_of(call: Call, stream: Stream) -> list[int]:
    """Head dims of K and, where it has any, of V."""
    _, qk, v = call.count.stream(stream)
    source = stream
    if stream.compress is not None:
        found = call.plan.pattern.input(stream.compress.source)
        assert isinstance(found, Stream)
        source = found
        needed = any(
            sweep.stream.name == stream.name and softmax.role.value == "branch"
            for softmax in call.plan.softmaxes
            for sweep in softmax.sweeps
        )
        return [qk, v] if needed and source.value is Values.OWN else [qk]
    return [qk, v] if source.value is Values.OWN else [qk]


def differentiable(call: Call, stream: Stream) -> bool:
    """Entries that only choose get no gradient."""
    return any(
        sweep.stream.name == stream.name and softmax.role.value == "branch"
        for softmax in call.softmaxes
        for sweep in softmax.sweeps
    )


def entry_flops(call: Call, stream: Stream, entries: int) -> Number:
    """A network has 2 qk hidden numbers, as in `example_inputs`."""
    heads, qk, _ = call.count.stream(stream)
    each = sum(pool_of(stream).work(stream.grid.width, dim, 2 * qk) for dim in sides_of(call, stream))
    return call.many(heads * entries * each)


def tokens_moved(call: Call, stream: Stream, tokens: int, entries: int) -> Number:
    dims = sum(sides_of(call, stream))
    return call.many(call.count.stream(stream)[0] * (tokens + entries) * dims * call.shape.size)
