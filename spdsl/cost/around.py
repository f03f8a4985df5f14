"""around: what a call starts before it attends: entries, and the cache."""

from __future__ import annotations

from collections.abc import Iterator

from spdsl.cost.entries import closed, differentiable, entry_flops, pool_of, sides_of, tokens_moved, weights_of
from spdsl.cost.kernels import INDEX_BYTES, Call, Kernel

VALUE_BYTES = {"bool": 1, "int": 8, "float": 4}  # of token tensors in the cache


def compress(call: Call) -> Iterator[Kernel]:
    """`attention` makes the entries of all tokens."""
    for stream in call.compressed:
        pool, sides = pool_of(stream), len(sides_of(call, stream))
        launches = pool.kernels[0] * sides if pool.kernels and call.count.entries(stream) > 0 else 0
        torch = pool.operators
        steps = (torch.forward + torch.clipped * stream.grid.is_clipped) * sides if torch else 0
        flops = entry_flops(call, stream, call.count.entries(stream))
        weights = weights_of(call, stream)
        tokens = tokens_moved(call, stream, call.length, call.count.entries(stream))
        read, moved = tokens + weights.once, tokens + weights.by_torch
        yield Kernel(
            f"{stream.name} entries", "compress", "forward", launches, steps, flops, flops, bytes=read, moved=moved
        )


def compress_backward(call: Call) -> Iterator[Kernel]:
    for stream in call.compressed:
        if not differentiable(call, stream):
            continue
        pool, sides = pool_of(stream), len(sides_of(call, stream))
        launches = pool.kernels[1] * sides if pool.kernels and call.count.entries(stream) > 0 else 0
        flops = entry_flops(call, stream, call.count.entries(stream)) * 2
        tokens = tokens_moved(call, stream, call.length, call.count.entries(stream))
        moved = (tokens + weights_of(call, stream).once) * 2
        torch = pool.operators
        steps = (torch.backward + torch.clipped_backward * stream.grid.is_clipped) * sides if torch else 0
        yield Kernel(
            f"{stream.name} entries, backward", "compress", "forward", launches, steps, flops, flops,
            bytes=moved, moved=moved,
        )  # fmt: skip


def cached(call: Call) -> Iterator[Kernel]:
    """New tokens are stored, then the entries that closed are made from the cache."""
    each = sum(call.count.stream(stream)[0] * sum(sides_of(call, stream)) for stream in call.streams) * call.shape.size
    each += sum(VALUE_BYTES[tensor.dtype] for tensor in call.token_tensors)
    moved = call.many(2 * call.queries * each)
    yield Kernel("append_rows", "cache", "copy", bytes=moved, moved=moved)
    counts = call.many(4 * INDEX_BYTES)  # lengths and dropped tokens, read and written
    yield Kernel("append_lengths", "cache", "copy", bytes=counts, moved=counts)
    for stream in call.plan.pattern.kept:
        yield from closed(call, stream)
