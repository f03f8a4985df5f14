"""pairs: the kernels whose keys are outermost, the parts of results that they leave, and the lists behind them."""

from __future__ import annotations

from collections.abc import Iterator

from spdsl.cost.attend import delta
from spdsl.cost.chosen import BACKWARD_STEPS, FILL_STEPS, added_slots
from spdsl.cost.kernels import INDEX_BYTES, LSE_BYTES, Call, Kernel
from spdsl.cost.unions import tile_units
from spdsl.ir.pattern import Choice, Phase
from spdsl.ir.plan import SoftmaxPlan
from spdsl.passes.count import Number
from spdsl.passes.series import Trace
from spdsl.passes.spans import size
from spdsl.runtime.tuning.configs import Config, table_dim

# Operators of torch for each turn of heads, as the tests count them in generated modules.
LIST_STEPS, CACHED_LIST_STEPS = 98, 119


def forward(call: Call, softmax: SoftmaxPlan, choice: Choice) -> Iterator[Kernel]:
    (qk, v), config = call.dims(softmax), _config(call, softmax, choice, "units")
    pairs, turns = _pairs(call, softmax, choice), _turns(call, softmax, choice, v)
    blocks, area = _blocks(call, softmax, choice, pairs, config), config.block_m * config.block_n
    yield _lists(call, softmax, choice, pairs, turns)
    rows = pairs * (qk * call.shape.size)  # gathered for each unit
    parts = pairs * ((v + 1) * LSE_BYTES)
    yield Kernel(
        f"{softmax.name}_forward", "attend", "units", launches=turns, steps=FILL_STEPS,
        flops=call.pairs(softmax) * (2 * (qk + v) * call.shape.batch),
        machine=blocks * (2 * area * sum(call.tile_dims(softmax))), exps=blocks * area,
        bytes=call.rows_bytes(softmax, qk + v) + call.keys_bytes(softmax) + call.list_bytes(choice, softmax),
        moved=rows + parts + call.keys_bytes(softmax) + pairs * INDEX_BYTES,
    )  # fmt: skip
    merged = parts + call.rows_bytes(softmax, v)
    yield Kernel("merge_pairs", "attend", "copy", launches=turns, moved=merged)


def backward(call: Call, softmax: SoftmaxPlan, choice: Choice) -> Iterator[Kernel]:
    (qk, v), (wide_qk, wide_v) = call.dims(softmax), call.tile_dims(softmax)
    pairs, visible = _pairs(call, softmax, choice), call.pairs(softmax)
    rows, keys = call.rows_bytes(softmax, qk + v), call.keys_bytes(softmax)
    gathered = pairs * ((qk + v) * call.shape.size + 2 * LSE_BYTES + INDEX_BYTES)
    yield delta(call, softmax)

    config, turns = _config(call, softmax, choice, "units_dq"), _turns(call, softmax, choice, qk)
    blocks, area = _blocks(call, softmax, choice, pairs, config), config.block_m * config.block_n
    parts = pairs * (qk * LSE_BYTES)
    yield _lists(call, softmax, choice, pairs, turns)
    yield Kernel(
        f"{softmax.name}_dq", "backward", "units_backward", launches=turns, steps=BACKWARD_STEPS,
        flops=visible * (2 * (2 * qk + v) * call.shape.batch),
        machine=blocks * (2 * area * (2 * wide_qk + wide_v)), exps=blocks * area,
        bytes=rows + rows + keys, moved=gathered + parts + keys,
    )  # fmt: skip
    yield Kernel("add_pairs", "backward", "copy", launches=turns, moved=parts + call.rows_bytes(softmax, qk))

    config = _config(call, softmax, choice, "units_dkdv")
    groups, area = call.count.stream(softmax.sweeps[0].stream)[0] * call.shape.batch, config.block_m * config.block_n
    blocks = _tiles(call, choice, pairs, groups, config.block_m) * (groups * choice.unit // config.block_n)
    yield _lists(call, softmax, choice, pairs, 1)
    yield Kernel(
        f"{softmax.name}_dkdv", "backward", "units_backward",
        flops=visible * (2 * (qk + v) * call.shape.batch),
        machine=blocks * (2 * area * (2 * wide_qk + 2 * wide_v)), exps=blocks * area,
        bytes=rows + keys * 2, moved=gathered + keys * 2,
    )  # fmt: skip
    longest = call.machine.job_tiles(choice.unit) * config.block_m
    yield from added_slots(call, choice, softmax, 1, longest)


def _config(call: Call, softmax: SoftmaxPlan, choice: Choice, kernel: str) -> Config:
    return call.machine.pair_shape(kernel, table_dim(kernel, *call.dims(softmax)), call.shape.size, choice.unit).config


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
        return Number(sum(-(-one * lists // block_m) for one in seen))
    return Number(group // block_m + min(units, group), exact=False)


def _spared(call: Call, choice: Choice, config: Config) -> int:
    """Blocks of its own unit that a query is not shown, where every query has chosen it."""
    last, own = call.length - 1, (call.length - 1) // choice.unit
    sets = call.count.units(choice, last, 0, Trace())
    everything = sets.room >= size(sets.forced) + size(sets.free)
    certain = [*sets.forced, *(sets.free if everything else [])]
    if not call.plan.pattern.causal or size(sets.forced) > sets.room or not any(a <= own < b for a, b in certain):
        return 0
    per_unit, rest = choice.unit // config.block_n, call.length - own * choice.unit

    def hidden(rows: int) -> int:
        """Of a tile that ends with row `rows` of the unit."""
        return per_unit - min(per_unit, -(-rows // config.block_n))

    # Rows of later queries fill the last tile of a unit, if its own do not; behind the last unit there are none.
    whole = sum(hidden(end) for end in range(config.block_m, choice.unit + 1, config.block_m))
    return own * whole + sum(
        hidden(min(end, rest)) for end in range(config.block_m, rest + config.block_m, config.block_m)
    )


def _turns(call: Call, softmax: SoftmaxPlan, choice: Choice, dim: int) -> int:
    """Heads go one after the other where the parts of all of them would need too much memory."""
    lists = call.lists(choice, softmax)
    size = call.shape.batch * call.queries * call.capacity(choice) * (dim + 1) * max(LSE_BYTES, call.shape.size)
    return -(-lists // max(1, call.machine.parts_bytes // size))


def _lists(call: Call, softmax: SoftmaxPlan, choice: Choice, pairs: Number, turns: int) -> Kernel:
    """Lists in; sorted by query, then by unit, each time read and written as 8 bytes."""
    moved = call.list_bytes(choice, softmax) + pairs * 64
    own = LIST_STEPS if call.phase is Phase.TRAIN else CACHED_LIST_STEPS
    return Kernel(f"{softmax.name} pairs", "lists", "copy", launches=0, steps=turns * own, bytes=moved, moved=moved)
