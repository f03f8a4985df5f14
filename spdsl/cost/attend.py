"""attend: the kernels of one softmax over ranges or lists of blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from spdsl.cost.kernels import Call, Kernel, listed
from spdsl.cost.machine import padded_group
from spdsl.cost.visits import key_tiles, row_tiles, step_blocks
from spdsl.ir.pattern import Phase
from spdsl.ir.plan import Role, SoftmaxPlan
from spdsl.passes.count import Number
from spdsl.runtime.launch.splits import lengths_to_try
from spdsl.runtime.tuning.configs import table_dim

FORWARD_STEPS = 2  # the results are filled before the launch
BACKWARD_STEPS = 1  # dQ is filled; and dK, dV for each stream
STREAM_STEPS = 2
LIST_STEPS = 44  # for the lists of one softmax; what its test reads comes on top
CLASS_STEPS, CLASS_BACKWARD_STEPS = 82, 12  # reordering by residue class, forward and backward


def forward(call: Call, softmax: SoftmaxPlan) -> Iterator[Kernel]:
    """Train and prefill."""
    qk, v = call.dims(softmax)
    own = _walked(call, softmax)
    config = call.machine.config(
        "forward", table_dim("forward", qk, v or 16), call.shape.size, softmax.softmax.bias is not None
    )
    tiles = _row_tiles(call, own, config.block_m, config.block_n)
    area = config.block_m * config.block_n
    moved = call.rows_bytes(softmax, qk + v) + call.keys_bytes(softmax)
    lists = LIST_STEPS if listed(own) else 0
    yield Kernel(
        f"{own.name}_forward", "attend" if softmax.role is Role.BRANCH else "score", "forward",
        steps=FORWARD_STEPS + lists + (CLASS_STEPS if own is not softmax else 0),
        flops=call.pairs(softmax) * (2 * (qk + v) * call.shape.batch),
        machine=tiles * (2 * area * sum(call.tile_dims(softmax))), exps=tiles * area,
        bytes=moved, moved=moved + _class_bytes(call, softmax, own),
    )  # fmt: skip


def backward(call: Call, softmax: SoftmaxPlan) -> Iterator[Kernel]:
    """delta, dQ, and dK and dV of each stream: seven products of tiles for the five of the algorithm."""
    (qk, v), (wide_qk, wide_v) = call.dims(softmax), call.tile_dims(softmax)
    own, pairs = _walked(call, softmax), call.pairs(softmax)
    rows = call.rows_bytes(softmax, qk + v)
    yield delta(call, softmax)
    bias = softmax.softmax.bias is not None
    config = call.machine.config("dq", table_dim("dq", qk, v), call.shape.size, bias)
    tiles, area = _row_tiles(call, own, config.block_m, config.block_n), config.block_m * config.block_n
    lists = LIST_STEPS if listed(own) else 0
    classes = CLASS_BACKWARD_STEPS if own is not softmax else 0
    moved = rows + rows + call.keys_bytes(softmax)
    yield Kernel(
        f"{own.name}_dq", "backward", "backward", steps=BACKWARD_STEPS + lists + classes,
        flops=pairs * (2 * (2 * qk + v) * call.shape.batch),
        machine=tiles * (2 * area * (2 * wide_qk + wide_v)), exps=tiles * area, bytes=moved, moved=moved,
    )  # fmt: skip
    config = call.machine.config("dkdv", table_dim("dkdv", qk, v), call.shape.size, bias)
    area = config.block_m * config.block_n
    for i, sweep in enumerate(own.sweeps):
        entries = call.count.entries(sweep.stream)

        def over(length: int, i: int = i) -> int:
            return _key_tiles(call, own, i, length, config.block_m, config.block_n)

        tiles = call.thinned(softmax, call.many(_over_classes(call, own, over)))
        heads, keys_qk, keys_v = call.count.stream(sweep.stream)
        gradients = call.many(2 * heads * entries * (keys_qk + keys_v) * call.shape.size)
        name = own.name if len(own.sweeps) == 1 else f"{own.name}_{sweep.stream.name}"
        yield Kernel(
            f"{name}_dkdv", "backward", "backward", launches=int(entries > 0),
            steps=STREAM_STEPS + (lists if i == 0 else 0),
            flops=pairs * (2 * (qk + v) * call.shape.batch) if i == 0 else Number(0),
            machine=tiles * (2 * area * (2 * wide_qk + 2 * wide_v)), exps=tiles * area,
            bytes=rows + gradients, moved=rows + gradients,
        )  # fmt: skip


def delta(call: Call, softmax: SoftmaxPlan) -> Kernel:
    _, v = call.dims(softmax)
    moved = call.rows_bytes(softmax, 2 * v)
    return Kernel("row_delta", "backward", "copy", bytes=moved, moved=moved)


def decode(call: Call, softmax: SoftmaxPlan) -> Iterator[Kernel]:
    """One query of each sequence, the heads of a group as rows; then the merge of the splits."""
    qk, v = call.dims(softmax)
    heads = call.count.heads(softmax.softmax)
    streams = [call.count.stream(sweep.stream) for sweep in softmax.sweeps]
    group = max(1, min(heads // own for own, _, _ in streams))  # heads that are not declared may not divide
    config = call.machine.config("decode", table_dim("decode", qk, v or 16), call.shape.size)
    rows, programs = padded_group(group), heads // group
    blocks, moved = 0, 0
    for sweep, (_, keys_qk, keys_v) in zip(softmax.sweeps, streams, strict=True):
        keys = call.count.entries(sweep.stream)
        found = step_blocks(sweep, keys, call.length, config.block_n)
        blocks += found
        row = keys_qk + (keys_v if v else 16)
        moved += programs * min(keys, found * config.block_n) * row * call.shape.size
    tiles = call.thinned(softmax, call.many(programs * blocks))
    area = rows * config.block_n
    read = call.count.read(softmax)
    pairs = call.thinned(softmax, call.many(step_pairs(call, softmax)))
    own = call.rows_bytes(softmax, qk + v)
    yield Kernel(
        f"{softmax.name}_decode", "attend" if softmax.role is Role.BRANCH else "score", "decode",
        flops=pairs * (2 * (qk + v)),
        machine=tiles * (2 * area * sum(call.tile_dims(softmax))), exps=tiles * area,
        bytes=call.thinned(softmax, read.bytes) + own,
        moved=call.thinned(softmax, call.many(moved)) + own,
    )  # fmt: skip


def splits(call: Call, softmax: SoftmaxPlan) -> int:
    """In how many parts the keys of a step are visited, if the cache has room for no more."""
    heads = call.count.heads(softmax.softmax)
    streams = [sweep.stream for sweep in softmax.sweeps]
    group = max(1, min(heads // call.count.stream(stream)[0] for stream in streams))
    visited = sum(
        max(step_blocks(sweep, call.count.entries(sweep.stream), length, 1) for length in lengths_to_try(call.length))
        for sweep in softmax.sweeps
    )
    return call.machine.splits(call.shape.batch * (heads // group), visited)


def step_pairs(call: Call, softmax: SoftmaxPlan) -> int:
    """Visible keys of the last query, over all heads."""
    heads, last = call.count.heads(softmax.softmax), call.length - 1
    if softmax.units is not None:
        return call.count.keys(softmax, last, range(1)).value * heads
    return sum(call.count.keys(softmax, last, range(head, head + 1)).value for head in range(heads))


def _walked(call: Call, softmax: SoftmaxPlan) -> SoftmaxPlan:
    """Whole sequences go by residue class where there is a step."""
    return softmax.of_class if softmax.of_class is not None and call.phase is Phase.TRAIN else softmax


def _over_classes(call: Call, softmax: SoftmaxPlan, tiles: Callable[[int], int]) -> int:
    """The sum over sequences: one, or one for each residue class."""
    step = next((one.step for one in call.softmaxes if one.of_class is softmax), 1)
    if step == 1:
        return tiles(call.length)
    short, longer = divmod(call.length, step)
    found = longer * tiles(short + 1)
    return found + ((step - longer) * tiles(short) if short else 0)


def _row_tiles(call: Call, softmax: SoftmaxPlan, block_m: int, block_n: int) -> Number:
    heads = call.count.heads(softmax.softmax)

    def tiles(length: int) -> int:
        return sum(
            row_tiles(sweep, length, call.count.entries(sweep.stream, length), length, block_m, block_n, heads)
            for sweep in softmax.sweeps
        )

    return call.thinned(softmax, call.many(_over_classes(call, softmax, tiles)))


def _key_tiles(call: Call, softmax: SoftmaxPlan, i: int, length: int, block_m: int, block_n: int) -> int:
    sweep, heads = softmax.sweeps[i], call.count.heads(softmax.softmax)
    return key_tiles(sweep, length, call.count.entries(sweep.stream, length), length, block_m, block_n, heads)


def _class_bytes(call: Call, softmax: SoftmaxPlan, own: SoftmaxPlan) -> Number:
    """Copies of everything, read and written: q, keys and the result."""
    if own is softmax:
        return Number(0)
    qk, v = call.dims(softmax)
    return (call.rows_bytes(softmax, qk + v) + call.keys_bytes(softmax)) * 2
