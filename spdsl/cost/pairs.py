"""pairs: the kernels whose keys are outermost, the parts of results that they leave, and the lists behind them."""

from __future__ import annotations

from math import gcd

from spdsl.cost.kernels import INDEX_BYTES, LSE_BYTES, Call, Kernel
from spdsl.cost.unions import tile_units
from spdsl.ir.pattern import Choice
from spdsl.ir.plan import SoftmaxPlan
from spdsl.ir.schedule import Stage, Step
from spdsl.passes.count import Number
from spdsl.passes.series import Trace
from spdsl.passes.spans import size
from spdsl.runtime.tuning.configs import Config, table_dim


def lists(call: Call, step: Step[SoftmaxPlan]) -> Kernel:
    """Lists in; sorted by query, then by unit, each time read and written as 8 bytes."""
    choice = _choice(step)
    moved = call.list_bytes(choice, step.of) + _pairs(call, step.of, choice) * 64
    return Kernel(step.name, "lists", "copy", bytes=moved, moved=moved)


def forward(call: Call, step: Step[SoftmaxPlan]) -> Kernel:
    softmax, choice, config = step.of, _choice(step), _config(call, step)
    (qk, v), pairs = call.dims(softmax), _pairs(call, softmax, choice)
    blocks, area = _blocks(call, softmax, choice, pairs, config), config.block_m * config.block_n
    rows = pairs * (qk * call.shape.size)  # gathered for each unit
    return Kernel(
        step.name, "attend", "units", flops=call.pairs(softmax) * (2 * (qk + v) * call.shape.batch),
        machine=blocks * (2 * area * sum(call.tile_dims(softmax))), exps=blocks * area,
        bytes=call.rows_bytes(softmax, qk + v) + call.keys_bytes(softmax) + call.list_bytes(choice, softmax),
        moved=rows + pairs * ((v + 1) * LSE_BYTES) + call.keys_bytes(softmax) + pairs * INDEX_BYTES,
    )  # fmt: skip


def merge_pairs(call: Call, step: Step[SoftmaxPlan]) -> Kernel:
    _, v = call.dims(step.of)
    parts = _pairs(call, step.of, _choice(step)) * ((v + 1) * LSE_BYTES)
    return Kernel(step.name, "attend", "copy", moved=parts + call.rows_bytes(step.of, v))


def dq(call: Call, step: Step[SoftmaxPlan]) -> Kernel:
    softmax, choice, config = step.of, _choice(step), _config(call, step)
    (qk, v), (wide_qk, wide_v) = call.dims(softmax), call.tile_dims(softmax)
    pairs, keys, rows = _pairs(call, softmax, choice), call.keys_bytes(softmax), call.rows_bytes(softmax, qk + v)
    blocks, area = _blocks(call, softmax, choice, pairs, config), config.block_m * config.block_n
    return Kernel(
        step.name, "backward", "units_backward", flops=call.pairs(softmax) * (2 * (2 * qk + v) * call.shape.batch),
        machine=blocks * (2 * area * (2 * wide_qk + wide_v)), exps=blocks * area,
        bytes=rows + rows + keys, moved=_gathered(call, softmax, pairs) + pairs * (qk * LSE_BYTES) + keys,
    )  # fmt: skip


def add_pairs(call: Call, step: Step[SoftmaxPlan]) -> Kernel:
    qk, _ = call.dims(step.of)
    parts = _pairs(call, step.of, _choice(step)) * (qk * LSE_BYTES)
    return Kernel(step.name, "backward", "copy", moved=parts + call.rows_bytes(step.of, qk))


def dkdv(call: Call, step: Step[SoftmaxPlan]) -> Kernel:
    softmax, choice, config = step.of, _choice(step), _config(call, step)
    (qk, v), (wide_qk, wide_v) = call.dims(softmax), call.tile_dims(softmax)
    pairs, keys, rows = _pairs(call, softmax, choice), call.keys_bytes(softmax), call.rows_bytes(softmax, qk + v)
    groups, area = call.count.stream(softmax.sweeps[0].stream)[0] * call.shape.batch, config.block_m * config.block_n
    blocks = _tiles(call, choice, pairs, groups, config.block_m) * (groups * choice.unit // config.block_n)
    return Kernel(
        step.name, "backward", "units_backward", flops=call.pairs(softmax) * (2 * (qk + v) * call.shape.batch),
        machine=blocks * (2 * area * (2 * wide_qk + 2 * wide_v)), exps=blocks * area,
        bytes=rows + keys * 2, moved=_gathered(call, softmax, pairs) + keys * 2,
    )  # fmt: skip


def tiles_of_job(call: Call, step: Step[SoftmaxPlan]) -> int:
    """Pairs of the longest job of dK and dV."""
    return call.machine.job_tiles(_choice(step).unit) * _config(call, step).block_m


def turns(call: Call, step: Step[SoftmaxPlan]) -> int:
    """Heads go one after the other where the parts of all of them would need too much memory."""
    (qk, v), choice = call.dims(step.of), _choice(step)
    dim = qk if call.stage is Stage.BACKWARD else v
    size = call.shape.batch * call.queries * call.capacity(choice) * (dim + 1) * max(LSE_BYTES, call.shape.size)
    return -(-call.lists(choice, step.of) // max(1, call.machine.parts_bytes // size))


def _choice(step: Step[SoftmaxPlan]) -> Choice:
    assert step.of.units is not None
    return step.of.units


def _config(call: Call, step: Step[SoftmaxPlan]) -> Config:
    dim, unit = table_dim(step.table, *call.dims(step.of)), _choice(step).unit
    return call.machine.pair_shape(step.table, dim, call.shape.size, unit).config


def _gathered(call: Call, softmax: SoftmaxPlan, pairs: Number) -> Number:
    """Rows of each pair, their lse, delta and number."""
    return pairs * (sum(call.dims(softmax)) * call.shape.size + 2 * LSE_BYTES + INDEX_BYTES)


def _pairs(call: Call, softmax: SoftmaxPlan, choice: Choice) -> Number:
    """Of a query of one head and a unit, in the batch."""
    return tile_units(call.count, choice, 1, 0.0) * (call.lists(choice, softmax) * call.shape.batch)


def _blocks(call: Call, softmax: SoftmaxPlan, choice: Choice, pairs: Number, config: Config) -> Number:
    """Blocks of keys over all tiles of rows of one head; none behind the position of the last row."""
    lists, per_unit = call.lists(choice, softmax), choice.unit // config.block_n
    tiles = _tiles(call, choice, pairs, lists * call.shape.batch, config.block_m)
    return (tiles * per_unit + Number(-_spared(call, choice, config))) * (lists * call.shape.batch)


def _tiles(call: Call, choice: Choice, pairs: Number, groups: int, block_m: int) -> Number:
    """Tiles of rows of one of `groups` groups of lists: the last one of each unit is not full.

    Exact where lists hold all that their queries see; at most one more tile for each unit else.
    """
    units, rows, group = -(-call.length // choice.unit), call.queries, pairs.value // groups
    seen = [rows - (unit * choice.unit if call.plan.pattern.causal else 0) for unit in range(units)]
    lists = group // sum(seen) if sum(seen) and not group % sum(seen) else 0
    if pairs.exact and lists:
        return Number(sum(-(-pairs_of_unit * lists // block_m) for pairs_of_unit in seen))
    return Number(group // block_m + min(units, group), exact=False)


def _spared(call: Call, choice: Choice, config: Config) -> int:
    """Blocks of its own unit that a query is not shown, where every query has chosen it."""
    last, own = call.length - 1, (call.length - 1) // choice.unit
    sets = call.count.units(choice, last, 0, Trace())
    everything = sets.room >= size(sets.forced) + size(sets.free)
    certain = [*sets.forced, *(sets.free if everything else [])]
    if not call.plan.pattern.causal or size(sets.forced) > sets.room or not any(a <= own < b for a, b in certain):
        return 0
    rest, block_m = call.length - own * choice.unit, config.block_m
    # Rows of later queries fill the last tile of a unit, if its own do not; behind the last unit there are none.
    tiles, last_tiles = choice.unit // block_m, -(-rest // block_m)
    whole = tiles * (choice.unit // config.block_n) - _blocks_shown(tiles, block_m, config.block_n)
    of_last = last_tiles * (choice.unit // config.block_n)
    of_last -= _blocks_shown(last_tiles - 1, block_m, config.block_n) + -(-rest // config.block_n)
    return own * whole + of_last


def _blocks_shown(tiles: int, block_m: int, block_n: int) -> int:
    """Blocks of block_n keys that a unit's first tiles of block_m rows see: ceil(block_m i / block_n), i = 1 to tiles.

    >>> _blocks_shown(3, 64, 16), _blocks_shown(5, 16, 64)
    (24, 6)
    """
    period = block_n // gcd(block_m, block_n)  # tiles that end with a block
    turns, left = divmod(tiles, period)
    more = block_m * period // block_n  # blocks of a period
    of_period = [-(-i * block_m // block_n) for i in range(1, period + 1)]
    return (
        turns * sum(of_period)
        + more * period * (turns * (turns - 1) // 2)
        + sum(of_period[:left])
        + left * more * turns
    )
