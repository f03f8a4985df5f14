"""around: what a call starts before it attends: entries, and the cache."""

from __future__ import annotations

from collections.abc import Iterator

from spdsl.cost.entries import closed, differentiable, entry_flops, sides_of, tokens_moved, weights_of
from spdsl.cost.kernels import INDEX_BYTES, Call, Kernel

STREAMING = ("mean", "max", "weighted")  # made by kernels
VALUE_BYTES = {"bool": 1, "int": 8, "float": 4}  # of token tensors in the cache
# Operators of torch, as the tests count them in generated modules.
STEPS = {"mlp": 8, "softmax": 5}
BACKWARD_STEPS = {"mlp": 8, "softmax": 8}
# Of them in `attention` and its backward so many more where cells may be clipped: absent tokens are masked.
CLIPPED_STEPS = {"mlp": 14, "softmax": 12}
CLIPPED_BACKWARD_STEPS = {"mlp": 1, "softmax": 3}


def compress(call: Call) -> Iterator[Kernel]:
    """`attention` makes the entries of all tokens."""
    for stream in call.compressed:
        assert stream.compress is not None
        by, sides = stream.compress.by, sides_of(call, stream)
        launches = len(sides) if by in STREAMING and call.count.entries(stream) > 0 else 0
        clipped = CLIPPED_STEPS.get(by, 0) * stream.grid.is_clipped
        steps = 0 if by in STREAMING else (STEPS[by] + clipped) * len(sides)
        flops = entry_flops(call, stream, call.count.entries(stream))
        weights = weights_of(call, stream)
        tokens = tokens_moved(call, stream, call.length, call.count.entries(stream))
        read, moved = tokens + weights.once, tokens + weights.by_torch
        yield Kernel(
            f"{stream.name} entries", "compress", "forward", launches, steps, flops, flops, bytes=read, moved=moved
        )


def compress_backward(call: Call) -> Iterator[Kernel]:
    for stream in call.compressed:
        assert stream.compress is not None
        by = stream.compress.by
        if not differentiable(call, stream):
            continue
        sides = len(sides_of(call, stream))
        kernels = {"mean": 1, "max": 2, "weighted": 2}.get(by, 0) * sides if call.count.entries(stream) else 0
        flops = entry_flops(call, stream, call.count.entries(stream)) * 2
        tokens = tokens_moved(call, stream, call.length, call.count.entries(stream))
        moved = (tokens + weights_of(call, stream).once) * 2
        clipped = CLIPPED_BACKWARD_STEPS.get(by, 0) * stream.grid.is_clipped
        steps = (BACKWARD_STEPS.get(by, 0) + clipped) * sides
        yield Kernel(
            f"{stream.name} entries, backward", "compress", "forward", kernels, steps, flops, flops,
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
