"""entries: what making the entries of compressed streams costs: their products, tokens and weights."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from spdsl.cost.kernels import Call, Kernel
from spdsl.ir.pattern import Stream
from spdsl.ir.schedule import Side, Step
from spdsl.passes.count import Number
from spdsl.passes.schedule.buffers import sides
from spdsl.passes.schedule.entries import pool_of


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


def entries(call: Call, step: Step[Side]) -> Kernel:
    """`attention` makes the entries of all tokens."""
    flops, tokens, weights = _all(call, step.of)
    read, moved = tokens + weights.once, tokens + weights.by_torch
    return Kernel(step.name, "compress", "forward", flops=flops, machine=flops, bytes=read, moved=moved)


def spread_entries(call: Call, step: Step[Side]) -> Kernel:
    """The work of a backward whole: kernels that stand beside it have none of their own here."""
    flops, tokens, weights = _all(call, step.of)
    flops, moved = flops * 2, (tokens + weights.once) * 2
    return Kernel(step.name, "compress", "forward", flops=flops, machine=flops, bytes=moved, moved=moved)


def beside(call: Call, step: Step[Side]) -> Kernel:
    """A step whose work `spread_entries` counts."""
    return Kernel(step.name, "compress", "forward")


def _all(call: Call, side: Side) -> tuple[Number, Number, Weights]:
    """FLOPs, bytes of tokens and entries, and weights of all entries of a side."""
    stream, dims = side.stream, [dim_of(call, side)]
    count = call.count.entries(stream)
    flops, moved = entry_flops(call, stream, count, dims), tokens_moved(call, stream, call.length, count, dims)
    return flops, moved, weights_of(call, stream, dims)


def dim_of(call: Call, side: Side) -> int:
    _, qk, v = call.count.stream(side.stream)
    return qk if side.name == "k" else v


def sides_of(call: Call, stream: Stream) -> list[int]:
    """Head dims of K and, where it has any, of V."""
    return [dim_of(call, Side(stream, name)) for name in sides(call.plan, stream)]


def weights_of(call: Call, stream: Stream, dims: list[int] | None = None) -> Weights:
    """A network has 2 qk hidden numbers, as in `example_inputs`."""
    pool, (heads, qk, _) = pool_of(stream), call.count.stream(stream)
    each = {"heads": heads, "width": stream.grid.width, "hidden": 2 * qk}
    sizes = [{**each, "dim": dim} for dim in dims or sides_of(call, stream)]
    roles = {role: sum(prod(size[axis] for axis in axes) for size in sizes) for role, axes in pool.weights}
    return Weights({role: count * call.shape.size for role, count in roles.items()}, pool.twice)


def entry_flops(call: Call, stream: Stream, entries: int, dims: list[int] | None = None) -> Number:
    """A network has 2 qk hidden numbers, as in `example_inputs`."""
    heads, qk, _ = call.count.stream(stream)
    each = sum(pool_of(stream).work(stream.grid.width, dim, 2 * qk) for dim in dims or sides_of(call, stream))
    return call.many(heads * entries * each)


def tokens_moved(call: Call, stream: Stream, tokens: int, entries: int, dims: list[int] | None = None) -> Number:
    wide = sum(dims or sides_of(call, stream))
    return call.many(call.count.stream(stream)[0] * (tokens + entries) * wide * call.shape.size)
