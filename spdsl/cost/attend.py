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
from spdsl.runtime.launch.splits import lengths_to_try, runs_in_splits
from spdsl.runtime.tuning.configs import Config, row_of_table, table_dim

_LOOKED_AT = 4  # times that torch reads or writes a number to find the bounds of tiles


def walked(call: Call, softmax: SoftmaxPlan) -> SoftmaxPlan:
    """Whole sequences go by residue class where there is a step."""
    return softmax.of_class if softmax.of_class is not None and call.phase is Phase.TRAIN else softmax


def config_of(call: Call, step: Step[SoftmaxPlan]) -> Config:
    (qk, v), size, skip = call.dims(step.of), call.shape.size, step.of.softmax.skip
    if skip is not None and step.table in ("forward", "decode"):
        return Config(skip.rows, skip.unit, 1, 1)  # what a tile is belongs to the meaning
    if step.table == "decode":
        return call.machine.config("decode", table_dim("decode", qk, v or 16), size)
    row = row_of_table(step.table, step.of.softmax.bias is not None, step.of.by_pair)
    found = call.machine.config(row, table_dim(step.table, qk, v or 16), size)
    return found if skip is None else found._replace(block_n=min(found.block_n, skip.unit))


def kept(call: Call, softmax: SoftmaxPlan, number: Number) -> Number:
    """What a softmax that skips tiles leaves of pairs or tiles: all of it, or the declared share."""
    return number if softmax.softmax.skip is None else Number(round(number.value * call.options.density), exact=False)


def forward(call: Call, step: Step[SoftmaxPlan]) -> Kernel:
    """Train and prefill."""
    softmax, config = step.of, config_of(call, step)
    qk, v = call.dims(softmax)
    own = walked(call, softmax)
    tiles, area = _row_tiles(call, own, config.block_m, config.block_n), config.block_m * config.block_n
    moved = call.rows_bytes(softmax, qk + v) + call.keys_bytes(softmax)
    read, loaded = pair_bytes(call, softmax, call.pairs(softmax))
    of_scores, of_values = call.tile_dims(softmax)
    pairs, left = call.pairs(softmax), kept(call, softmax, call.pairs(softmax))
    tiles_left = kept(call, softmax, tiles)
    return Kernel(
        step.name, "attend" if softmax.role is Role.BRANCH else "score", "forward",
        flops=pairs * (2 * qk * call.shape.batch) + left * (2 * v * call.shape.batch),
        machine=tiles * (2 * area * of_scores) + tiles_left * (2 * area * of_values), exps=tiles_left * area,
        bytes=moved + read, moved=moved + loaded + _class_bytes(call, softmax, own),
    )  # fmt: skip


def dq(call: Call, step: Step[SoftmaxPlan]) -> Kernel:
    softmax, config = step.of, config_of(call, step)
    qk, v = call.dims(softmax)
    tiles = kept(call, softmax, _row_tiles(call, walked(call, softmax), config.block_m, config.block_n))
    area, rows = config.block_m * config.block_n, call.rows_bytes(softmax, qk + v)
    moved = rows + rows + call.keys_bytes(softmax)
    read, loaded = pair_bytes(call, softmax, call.pairs(softmax))
    return Kernel(
        step.name, "backward", "backward", flops=kept(call, softmax, call.visible_flops(step)),
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

    tiles = kept(call, softmax, call.thinned(softmax, call.many(_over_classes(call, own, over))))
    stream = own.sweeps[step.index].stream
    heads, keys_qk, keys_v = call.count.stream(stream)
    gradients = call.many(2 * heads * call.count.entries(stream) * (keys_qk + keys_v) * call.shape.size)
    moved = call.rows_bytes(softmax, qk + v) + gradients
    read, loaded = pair_bytes(call, softmax, call.pairs(softmax)) if step.index == 0 else (NONE, NONE)
    return Kernel(
        step.name, "backward", "backward",
        flops=kept(call, softmax, call.visible_flops(step)) if step.index == 0 else NONE,
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
    blocks, moved, moved_values = 0, 0, 0
    for sweep in softmax.sweeps:
        (_, keys_qk, keys_v), keys = call.count.stream(sweep.stream), call.count.entries(sweep.stream)
        visited = step_blocks(sweep, keys, call.length, config.block_n)
        blocks += visited
        numbers = programs * min(keys, visited * config.block_n) * call.shape.size
        moved, moved_values = moved + numbers * keys_qk, moved_values + numbers * (keys_v if v else 16)
    tiles, area = call.thinned(softmax, call.many(programs * blocks)), rows * config.block_n
    pairs = call.thinned(softmax, call.many(step_pairs(call, softmax)))
    of_scores, of_values = call.tile_dims(softmax)
    tiles_left, left = kept(call, softmax, tiles), kept(call, softmax, pairs)
    once = call.thinned(softmax, call.count.read(softmax).bytes)
    once = once if softmax.softmax.skip is None else _without_values(once, kept(call, softmax, once), qk, v)
    own = call.rows_bytes(softmax, qk + v)
    read, loaded = pair_bytes(call, softmax, call.thinned(softmax, Number(step_pairs(call, softmax))))
    return Kernel(
        step.name, "attend" if softmax.role is Role.BRANCH else "score", "decode",
        flops=pairs * (2 * qk) + left * (2 * v),
        machine=tiles * (2 * area * of_scores) + tiles_left * (2 * area * of_values), exps=tiles_left * area,
        bytes=once + own + read,
        moved=call.thinned(softmax, call.many(moved)) + own + loaded
        + kept(call, softmax, call.thinned(softmax, call.many(moved_values))),
    )  # fmt: skip


def _without_values(whole: Number, left: Number, qk: int, v: int) -> Number:
    """Bytes of keys, all of them, and of the values that are left."""
    return Number((whole.value * qk + left.value * v) // (qk + v), exact=False)


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
    skip = softmax.softmax.skip
    if skip is not None:
        return runs_in_splits(call.length, skip.restart)
    heads, group = call.count.heads(softmax.softmax), _group(call, softmax)
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


def _over_classes(call: Call, softmax: SoftmaxPlan, tiles: Callable[[int], int]) -> int:
    """The sum over sequences: one, or one for each residue class."""
    step = next((other.step for other in call.softmaxes if other.of_class == softmax), 1)
    if step == 1:
        return tiles(call.length)
    short, longer = divmod(call.length, step)
    total = longer * tiles(short + 1)
    return total + ((step - longer) * tiles(short) if short else 0)


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
