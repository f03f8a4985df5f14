"""around: what a call starts besides attention and selection: entries, the cache, gates and merges."""

from __future__ import annotations

from collections.abc import Iterator

from spdsl.cost.kernels import INDEX_BYTES, LSE_BYTES, NONE, Call, Kernel
from spdsl.ir.pattern import Branch, Gate, Merge, Phase, Stream, Values
from spdsl.passes.count import Number
from spdsl.passes.joint import leaves

STREAMING = ("mean", "max", "weighted")  # made by kernels in `attention`; with a cache by torch
VALUE_BYTES = {"bool": 1, "int": 8, "float": 4}  # of token tensors in the cache
# Operators of torch, as the tests count them in generated modules.
POOL_STEPS = {"mean": 2, "max": 1, "weighted": 9, "mlp": 8, "softmax": 5}
COPY_STEPS = {"mlp": 2}  # cells put heads first, which takes a copy where both batch and entries are more than one
POOL_BACKWARD_STEPS = {"mlp": 8, "softmax": 8}
# Of them in `attention`, its backward and a cache so many more where cells may be clipped: absent tokens are masked.
CLIPPED_STEPS = {"mlp": 14, "softmax": 12}
CLIPPED_BACKWARD_STEPS = {"mlp": 1, "softmax": 3}
CLIPPED_POOL_STEPS = {"mean": 2, "max": 2, "weighted": 4, "mlp": 3, "softmax": 2}
CLIPPED_COPY_STEPS = {"weighted": 2}
LSE_STEPS = 1  # one lse per branch, beside each other
MERGE_STEPS = 24  # of two branches
SETTLE_STEPS = 3  # a condition, and the choice of out and lse by it


def compress(call: Call) -> Iterator[Kernel]:
    """`attention` makes the entries of all tokens."""
    for stream in call.compressed:
        assert stream.compress is not None
        by, sides = stream.compress.by, _sides(call, stream)
        launches = len(sides) if by in STREAMING and call.count.entries(stream) > 0 else 0
        clipped = CLIPPED_STEPS.get(by, 0) * stream.grid.is_clipped
        steps = 0 if by in STREAMING else (POOL_STEPS[by] + clipped) * len(sides)
        flops = _flops(call, stream, call.count.entries(stream))
        moved = _moved(call, stream, call.length, call.count.entries(stream))
        yield Kernel(
            f"{stream.name} entries", "compress", "forward", launches, steps, flops, flops, bytes=moved, moved=moved
        )


def compress_backward(call: Call) -> Iterator[Kernel]:
    for stream in call.compressed:
        assert stream.compress is not None
        by = stream.compress.by
        if not _differentiable(call, stream):
            continue
        sides = len(_sides(call, stream))
        kernels = {"mean": 1, "max": 2, "weighted": 2}.get(by, 0) * sides if call.count.entries(stream) else 0
        flops = _flops(call, stream, call.count.entries(stream)) * 2
        moved = _moved(call, stream, call.length, call.count.entries(stream)) * 2
        clipped = CLIPPED_BACKWARD_STEPS.get(by, 0) * stream.grid.is_clipped
        steps = (POOL_BACKWARD_STEPS.get(by, 0) + clipped) * sides
        yield Kernel(
            f"{stream.name} entries, backward", "compress", "forward", kernels, steps, flops, flops,
            bytes=moved, moved=moved,
        )  # fmt: skip


def cached(call: Call) -> Iterator[Kernel]:
    """New tokens are stored, then the entries that closed are made from the cache."""
    new = call.many(2 * call.queries)
    for stream in call.streams:
        moved = new * (call.count.stream(stream)[0] * sum(_sides(call, stream)) * call.shape.size)
        yield Kernel("append_rows", "cache", "copy", bytes=moved, moved=moved)
    for tensor in call.token_tensors:
        moved = new * VALUE_BYTES[tensor.dtype]
        yield Kernel("append_values", "cache", "copy", bytes=moved, moved=moved)
    counts = call.many(4 * INDEX_BYTES)  # lengths and dropped tokens, read and written
    yield Kernel("append_lengths", "cache", "copy", bytes=counts, moved=counts)
    for stream in call.plan.pattern.kept:
        assert stream.compress is not None
        entries = -(-call.queries // stream.grid.stride)
        flops, dims = _flops(call, stream, entries), _sides(call, stream)
        sources = 1 if stream.compress.logits is None else 2
        cells = _moved(call, stream, entries * stream.grid.width, 0)
        yield Kernel(
            "take_cells", "compress", "copy", launches=sources, bytes=cells * sources, moved=cells * (2 * sources)
        )
        by = stream.compress.by
        alone, clipped = min(call.shape.batch, entries) == 1, stream.grid.is_clipped
        copied = (COPY_STEPS.get(by, 0) + CLIPPED_COPY_STEPS.get(by, 0) * clipped) * alone
        moved, made = _moved(call, stream, entries * stream.grid.width, entries), _moved(call, stream, 0, entries)
        steps = (POOL_STEPS[by] + CLIPPED_POOL_STEPS[by] * clipped - copied) * len(dims)
        yield Kernel(f"{stream.name} pools", "compress", "forward", 0, steps, flops, flops, bytes=moved, moved=moved)
        yield Kernel("put_entries", "compress", "copy", bytes=made, moved=made * 2)


def together(call: Call) -> Iterator[Kernel]:
    """How the branches of each result become one."""
    for branch in _branches(call):
        found = _together_bytes(call, branch)
        if isinstance(branch, Gate):
            yield Kernel("gate_rows", "combine", "copy", 1, LSE_STEPS, bytes=found, moved=found)
        elif isinstance(branch, Merge):
            if _joint(call, branch) or call.phase is not Phase.TRAIN:
                yield Kernel("merge_rows", "combine", "copy", bytes=found, moved=found)
            else:
                yield Kernel("merge", "combine", "copy", 0, MERGE_STEPS, bytes=found, moved=found)


def settled(call: Call) -> Iterator[Kernel]:
    """Which of the results of a call with a cache answers."""
    conditions = [one for one in call.plan.pattern.cases_of(call.phase) if one.condition is not None]
    if conditions:
        moved = _together_bytes(call, conditions[0].branch) * len(conditions)
        steps = SETTLE_STEPS * len(conditions)
        yield Kernel("choice of results", "combine", "copy", 0, steps, bytes=moved, moved=moved)


def together_backward(call: Call) -> Iterator[Kernel]:
    for branch in _branches(call):
        found = _together_bytes(call, branch) * 2
        if isinstance(branch, Gate):
            yield Kernel("gate_gradients", "combine", "copy", 1, bytes=found, moved=found)
        elif isinstance(branch, Merge) and not _joint(call, branch):
            yield Kernel("merge, backward", "combine", "copy", 0, MERGE_STEPS, bytes=found, moved=found)
        elif isinstance(branch, Merge):
            yield _sums(call, branch)


def _sums(call: Call, branch: Branch) -> Kernel:
    """Gradients that several parts of a joint have are added up; that of an lse, which each part counts, is one."""
    plans = [one for one in call.softmaxes if one.name in leaves(branch)]
    found, again, steps = set(), NONE, 1 - len(plans)
    for one in plans:
        qk, _ = call.dims(one)
        query = one.softmax.query
        if query in found:
            again, steps = again + call.rows_bytes(one, qk) * 3, steps + 1
        found.add(query)
        for sweep in one.sweeps:
            stream = sweep.stream
            if stream.name in found:
                heads, keys_qk, keys_v = call.count.stream(stream)
                sides = keys_qk + (keys_v if stream.value is Values.OWN else 0)
                again += call.many(3 * heads * call.count.entries(stream) * sides * call.shape.size)
                steps += 1 + (stream.value is Values.OWN)
            found.add(stream.name)
    return Kernel("sums of parts", "combine", "copy", 0, steps, bytes=again, moved=again)


def _joint(call: Call, branch: Branch) -> bool:
    return leaves(branch) in {one.parts for one in call.plan.joints}


def _branches(call: Call) -> list[Branch]:
    """With a cache every case is computed."""
    if call.phase is Phase.TRAIN:
        return [call.count.case(call.phase).branch]
    return [case.branch for case in call.plan.pattern.cases_of(call.phase)]


def _together_bytes(call: Call, branch: Branch) -> Number:
    parts = len(branch.branches) if isinstance(branch, Gate | Merge) else 1
    heads, v = call.shape.heads, call.shape.v
    return call.many(call.queries * heads * ((parts + 1) * v * call.shape.size + parts * LSE_BYTES))


def _sides(call: Call, stream: Stream) -> list[int]:
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


def _differentiable(call: Call, stream: Stream) -> bool:
    """Entries that only choose get no gradient."""
    return any(
        sweep.stream.name == stream.name and softmax.role.value == "branch"
        for softmax in call.softmaxes
        for sweep in softmax.sweeps
    )


def _flops(call: Call, stream: Stream, entries: int) -> Number:
    """A gelu network has 2 d hidden numbers, as in `example_inputs`."""
    assert stream.compress is not None
    by, width, qk = stream.compress.by, stream.grid.width, call.count.stream(stream)[1]
    found = 0
    for dim in _sides(call, stream):
        if by == "mlp":
            found += 2 * width * dim * 2 * qk + 2 * 2 * qk * dim
        else:
            found += {"softmax": 4, "weighted": 3}.get(by, 1) * width * dim
    return call.many(call.count.stream(stream)[0] * entries * found)


def _moved(call: Call, stream: Stream, tokens: int, entries: int) -> Number:
    dims = sum(_sides(call, stream))
    return call.many(call.count.stream(stream)[0] * (tokens + entries) * dims * call.shape.size)
