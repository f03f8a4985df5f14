"""attend: the kernels of one softmax over ranges or lists of blocks."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from spdsl.cost.cache import VALUE_BYTES
from spdsl.cost.kernels import NONE, Call, Kernel
from spdsl.cost.machine import padded_group
from spdsl.cost.visits import key_tiles, row_tiles, step_blocks
from spdsl.ir.pattern import Phase, Tensor
from spdsl.ir.plan import Role, SoftmaxPlan
from spdsl.ir.schedule import Stage, Step
from spdsl.passes.count import Number
from spdsl.runtime.launch.splits import lengths_to_try
from spdsl.runtime.tuning.configs import Config, row_of_table, table_dim

_LOOKED_AT = 4  # times that torch reads or writes a number to find the bounds of tiles


def walked(call: Call, softmax: SoftmaxPlan) -> SoftmaxPlan:
    """Whole sequences go by residue class where there is a step."""
    return softmax.of_class if softmax.of_class is not None and call.phase is Phase.TRAIN else softmax


def config_of(call: Call, step: Step[SoftmaxPlan]) -> Config:
    (qk, v), size = call.dims(step.of), call.shape.size
    if step.table == "decode":
        return call.machine.config("decode", table_dim("decode", qk, v or 16), size)
    row = row_of_table(step.table, step.of.softmax.bias is not None, step.of.by_pair)
    return call.machine.config(row, table_dim(step.table, qk, v or 16), size)


def forward(call: Call, step: Step[SoftmaxPlan]) -> Kernel:
    """Train and prefill."""
    softmax, config = step.of, config_of(call, step)
    qk, v = call.dims(softmax)
    own = walked(call, softmax)
    tiles, area = _row_tiles(call, own, config.block_m, config.block_n), config.block_m * config.block_n
    moved = call.rows_bytes(softmax, qk + v) + call.keys_bytes(softmax)
    read, loaded = pair_bytes(call, softmax, call.pairs(softmax))
    return Kernel(
        step.name, "attend" if softmax.role is Role.BRANCH else "score", "forward",
        flops=call.visible_flops(step),
        machine=tiles * (area * call.tile_flops(step.kind, softmax)), exps=tiles * area,
        bytes=moved + read, moved=moved + loaded + _class_bytes(call, softmax, own),
    )  # fmt: skip


def dq(call: Call, step: Step[SoftmaxPlan]) -> Kernel:
    softmax, config = step.of, config_of(call, step)
    qk, v = call.dims(softmax)
    tiles = _row_tiles(call, walked(call, softmax), config.block_m, config.block_n)
    area, rows = config.block_m * config.block_n, call.rows_bytes(softmax, qk + v)
    moved = rows + rows + call.keys_bytes(softmax)
    read, loaded = pair_bytes(call, softmax, call.pairs(softmax))
    return Kernel(
        step.name, "backward", "backward", flops=call.visible_flops(step),
        machine=tiles * (area * call.tile_flops(step.kind, softmax)), exps=tiles * area, bytes=moved + read,
        moved=moved + loaded,
    )  # fmt: skip


def dkdv(call: Call, step: Step[SoftmaxPlan]) -> Kernel:
    """One stream; the pairs of all of them count with the first."""
    softmax, config = step.of, config_of(call, step)
    qk, v = call.dims(softmax)
    own, area = walked(call, softmax), config.block_m * config.block_n

    def over(length: int) -> int:
        return _key_tiles(call, own, step.index, length, config.block_m, config.block_n)

    tiles, stream = call.thinned(softmax, call.many(_over_classes(call, own, over))), own.sweeps[step.index].stream
    heads, keys_qk, keys_v = call.count.stream(stream)
    gradients = call.many(2 * heads * call.count.entries(stream) * (keys_qk + keys_v) * call.shape.size)
    moved = call.rows_bytes(softmax, qk + v) + gradients
    read, loaded = pair_bytes(call, softmax, call.pairs(softmax)) if step.index == 0 else (NONE, NONE)
    return Kernel(
        step.name, "backward", "backward",
        flops=call.visible_flops(step) if step.index == 0 else NONE,
        machine=tiles * (area * call.tile_flops(step.kind, softmax)), exps=tiles * area, bytes=moved + read,
        moved=moved + loaded,
    )  # fmt: skip


def delta(call: Call, step: Step[SoftmaxPlan]) -> Kernel:
    moved = call.rows_bytes(step.of, 2 * call.dims(step.of)[1])
    return Kernel(step.name, "backward", "copy", bytes=moved, moved=moved)


def by_torch(call: Call, step: Step[SoftmaxPlan]) -> Kernel:
    """Lists of tiles and the order of classes: small beside what their kernels read, which counts the copies.

    Where the caller has a number for each pair, each is looked at for the lists.
    """
    role = "attend" if step.of.role is Role.BRANCH else "score"
    read, _ = pair_bytes(call, step.of, call.pairs(step.of)) if step.of.maps else (NONE, NONE)
    return Kernel(
        step.name, role if call.stage is not Stage.BACKWARD else "backward", "copy", bytes=read, moved=read * _LOOKED_AT
    )


def add_front(call: Call, step: Step[SoftmaxPlan]) -> Kernel:
    """dV, read, and the front of dK, read and written."""
    stream = step.of.sweeps[step.index].stream
    heads, qk, v = call.count.stream(stream)
    moved = call.many(3 * heads * call.count.entries(stream) * (v or qk) * call.shape.size)
    return Kernel(step.name, "backward", "copy", bytes=moved, moved=moved)


def decode(call: Call, step: Step[SoftmaxPlan]) -> Kernel:
    """One query of each sequence, the heads of a group as rows."""
    softmax, config = step.of, config_of(call, step)
    qk, v = call.dims(softmax)
    heads, group = call.count.heads(softmax.softmax), _group(call, softmax)
    rows, programs = padded_group(group), heads // group
    blocks, moved = 0, 0
    for sweep in softmax.sweeps:
        (_, keys_qk, keys_v), keys = call.count.stream(sweep.stream), call.count.entries(sweep.stream)
        visited = step_blocks(sweep, keys, call.length, config.block_n, softmax.softmax.rows)
        blocks += visited
        row = keys_qk + (keys_v if v else 16)
        moved += programs * min(keys, visited * config.block_n) * row * call.shape.size
    tiles, area = call.thinned(softmax, call.many(programs * blocks)), rows * config.block_n
    pairs = call.thinned(softmax, call.many(step_pairs(call, softmax)))
    own = call.rows_bytes(softmax, qk + v)
    read, loaded = pair_bytes(call, softmax, call.thinned(softmax, Number(step_pairs(call, softmax))))
    return Kernel(
        step.name, "attend" if softmax.role is Role.BRANCH else "score", "decode",
        flops=pairs * call.pair_flops(step.kind, softmax),
        machine=tiles * (area * call.tile_flops(step.kind, softmax)), exps=tiles * area,
        bytes=call.thinned(softmax, call.count.read(softmax).bytes) + own + read,
        moved=call.thinned(softmax, call.many(moved)) + own + loaded,
    )  # fmt: skip


def pair_bytes(call: Call, softmax: SoftmaxPlan, pairs: Number) -> tuple[Number, Number]:
    """Of tensors with a number for each of these pairs of all heads: all numbers once, and as each head reads them."""
    found = [one for one in softmax.reads if isinstance(one, Tensor) and one.by_pair]
    heads = call.count.heads(softmax.softmax)
    own = {"head": heads, "kv_head": call.count.stream(softmax.sweeps[0].stream)[0]}
    once = sum(VALUE_BYTES[one.dtype] * prod(own.get(str(axis), 1) for axis in one.axes) for one in found)
    each = sum(VALUE_BYTES[one.dtype] for one in found)
    batch = call.shape.batch
    return Number(pairs.value * once * batch // heads, pairs.exact), pairs * (each * batch)


def _group(call: Call, softmax: SoftmaxPlan) -> int:
    """Query heads of a program; heads that are not declared may not divide."""
    heads = call.count.heads(softmax.softmax)
    return max(1, min(heads // call.count.stream(sweep.stream)[0] for sweep in softmax.sweeps))


def splits(call: Call, softmax: SoftmaxPlan) -> int:
    """In how many parts the keys of a step are visited, if the cache has room for no more."""
    heads, group = call.count.heads(softmax.softmax), _group(call, softmax)
    visited = sum(
        max(
            step_blocks(sweep, call.count.entries(sweep.stream), length, 1, softmax.softmax.rows)
            for length in lengths_to_try(call.length)
        )
        for sweep in softmax.sweeps
    )
    return call.machine.splits(call.shape.batch * (heads // group), visited)


def step_pairs(call: Call, softmax: SoftmaxPlan) -> int:
    """Visible keys of the last query, over all heads."""
    heads, last = call.count.heads(softmax.softmax), (call.length - 1) // softmax.softmax.rows
    if softmax.units is not None:
        return call.count.keys(softmax, last, range(1)).value * heads
    return sum(call.count.keys(softmax, last, range(head, head + 1)).value for head in range(heads))


def _over_classes(call: Call, softmax: SoftmaxPlan, tiles: Callable[[int], int]) -> int:
    """The sum over sequences: one, or one for each residue class."""
    step = next((other.step for other in call.softmaxes if other.of_class == softmax), 1)
    if step == 1:
        return tiles(call.length)
    short, longer = divmod(call.length, step)
    total = longer * tiles(short + 1)
    return total + ((step - longer) * tiles(short) if short else 0)


def _row_tiles(call: Call, softmax: SoftmaxPlan, block_m: int, block_n: int) -> Number:
    heads, (first, rows) = call.count.heads(softmax.softmax), call.count.rows(softmax.softmax)

    def tiles(length: int) -> int:
        own = min(rows, length)  # of a residue class all of its queries
        return sum(
            row_tiles(sweep, own, call.count.entries(sweep.stream, length), length, block_m, block_n, heads, first)
            for sweep in softmax.sweeps
        )

    return call.thinned(softmax, call.many(_over_classes(call, softmax, tiles)))


def _key_tiles(call: Call, softmax: SoftmaxPlan, i: int, length: int, block_m: int, block_n: int) -> int:
    sweep, heads = softmax.sweeps[i], call.count.heads(softmax.softmax)
    rows = min(call.count.rows(softmax.softmax)[1], length)
    return key_tiles(sweep, rows, call.count.entries(sweep.stream, length), length, block_m, block_n, heads)


def _class_bytes(call: Call, softmax: SoftmaxPlan, own: SoftmaxPlan) -> Number:
    """Copies of everything, read and written: q, keys and the result."""
    if own is softmax:
        return Number(0)
    qk, v = call.dims(softmax)
    return (call.rows_bytes(softmax, qk + v) + call.keys_bytes(softmax)) * 2
