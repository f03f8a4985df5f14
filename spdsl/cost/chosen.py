"""chosen: the kernels that choose units and those that walk them, and the lists that torch makes for them."""

from __future__ import annotations

from collections.abc import Iterator

from spdsl.cost.attend import delta, step_pairs
from spdsl.cost.kernels import INDEX_BYTES, LSE_BYTES, NONE, Call, Kernel
from spdsl.cost.machine import padded
from spdsl.cost.unions import select_steps, tile_units
from spdsl.ir.pattern import Choice, Phase
from spdsl.ir.plan import ChoicePlan, SoftmaxPlan
from spdsl.passes.count import Number
from spdsl.passes.selection import ranked
from spdsl.passes.series import Trace
from spdsl.passes.spans import size
from spdsl.runtime.tuning.configs import table_dim
from spdsl.runtime.tuning.unit_configs import MOST_UNIT, UnitShape

# Operators of torch, as the tests count them in generated modules.
UNION_STEPS, CACHED_UNION_STEPS = 47, 59
INVERSE_STEPS = 50
FILL_STEPS, BACKWARD_STEPS = 2, 3  # results; dQ, dK and dV


def _shape(call: Call, softmax: SoftmaxPlan, choice: Choice, kernel: str) -> UnitShape:
    qk, v = call.dims(softmax)
    group = call.group(choice, softmax)
    make = call.machine.unit_step if call.phase is Phase.DECODE else call.machine.unit_shape
    return make(kernel, table_dim(kernel, qk, v), call.shape.size, group, choice.unit)


def union_of(call: Call, choice: Choice, softmax: SoftmaxPlan, lanes: int) -> Number:
    """Units of all tiles of all lists of the batch."""
    found = tile_units(call.count, choice, lanes, call.options.overlap)
    return found * (call.lists(choice, softmax) * call.shape.batch)


def union_bytes(call: Call, softmax: SoftmaxPlan, choice: Choice, lanes: int) -> Number:
    """Lists in, units and masks out, both padded to the room of a tile."""
    tiles = -(-call.queries // lanes)
    width = max(1, min(call.capacity(choice) * lanes, -(-call.length // choice.unit)))
    out = call.many(tiles * call.lists(choice, softmax) * width * (INDEX_BYTES + 8))
    return call.list_bytes(choice, softmax) + out


def forward(call: Call, softmax: SoftmaxPlan, choice: Choice) -> Iterator[Kernel]:
    (qk, v), shape = call.dims(softmax), _shape(call, softmax, choice, "units")
    config = shape.config
    blocks = union_of(call, choice, softmax, shape.lanes) * (choice.unit // config.block_n)
    area = config.block_m * config.block_n
    steps = UNION_STEPS if call.phase is Phase.TRAIN else CACHED_UNION_STEPS
    lists = union_bytes(call, softmax, choice, shape.lanes)
    yield Kernel(f"{softmax.name} unions", "lists", "copy", launches=0, steps=steps, bytes=lists, moved=lists)
    moved = call.rows_bytes(softmax, qk + v) + call.keys_bytes(softmax)
    yield Kernel(
        f"{softmax.name}_forward", "attend", "units", steps=FILL_STEPS,
        flops=call.pairs(softmax) * (2 * (qk + v) * call.shape.batch),
        machine=blocks * (2 * area * sum(call.tile_dims(softmax))), exps=blocks * area,
        bytes=moved + call.list_bytes(choice, softmax), moved=moved + lists,
    )  # fmt: skip


def backward(call: Call, softmax: SoftmaxPlan, choice: Choice) -> Iterator[Kernel]:
    (qk, v), (wide_qk, wide_v) = call.dims(softmax), call.tile_dims(softmax)
    shape, pairs = _shape(call, softmax, choice, "units_dq"), call.pairs(softmax)
    per_unit = choice.unit // shape.config.block_n
    blocks, area = union_of(call, choice, softmax, shape.lanes) * per_unit, shape.config.block_m * shape.config.block_n
    rows, keys = call.rows_bytes(softmax, qk + v), call.keys_bytes(softmax)
    yield delta(call, softmax)
    lists = union_bytes(call, softmax, choice, shape.lanes)
    yield Kernel(f"{softmax.name} unions", "lists", "copy", launches=0, steps=UNION_STEPS, bytes=lists, moved=lists)
    yield Kernel(
        f"{softmax.name}_dq", "backward", "units_backward", steps=BACKWARD_STEPS,
        flops=pairs * (2 * (2 * qk + v) * call.shape.batch),
        machine=blocks * (2 * area * (2 * wide_qk + wide_v)), exps=blocks * area,
        bytes=rows + rows + keys, moved=rows + rows + keys + lists,
    )  # fmt: skip
    lanes, shape = shape.lanes, _shape(call, softmax, choice, "units_dkdv")
    again = UNION_STEPS if shape.lanes != lanes else 0
    visits = union_of(call, choice, softmax, shape.lanes)
    area = shape.config.block_m * shape.config.block_n
    blocks = visits * (choice.unit // shape.config.block_n)
    inverse = visits * (3 * (INDEX_BYTES + 8))  # sorted by unit: numbers and masks, read and written
    yield Kernel(
        f"{softmax.name} inverse lists", "lists", "copy", launches=0, steps=INVERSE_STEPS + again,
        bytes=inverse, moved=inverse,
    )  # fmt: skip
    yield Kernel(
        f"{softmax.name}_dkdv", "backward", "units_backward",
        flops=pairs * (2 * (qk + v) * call.shape.batch),
        machine=blocks * (2 * area * (2 * wide_qk + 2 * wide_v)), exps=blocks * area,
        bytes=rows + keys * 2, moved=rows + keys * 2,
    )  # fmt: skip
    yield from added_slots(call, choice, softmax, shape.lanes, call.machine.job_tiles(choice.unit))


def added_slots(call: Call, choice: Choice, softmax: SoftmaxPlan, lanes: int, longest: int) -> Iterator[Kernel]:
    """The parts of units that several jobs of `longest` tiles share: their room is known from sizes alone."""
    heads, qk, v = call.count.stream(softmax.sweeps[0].stream)
    tiles = call.shape.batch * -(-call.length // lanes)
    width = max(1, min(call.capacity(choice) * lanes, -(-call.length // choice.unit)))
    lists = max(1, call.lists(choice, softmax) // heads)
    if slots := 2 * (tiles * width * lists // longest):
        parts = Number(heads * slots * choice.unit * (qk + (v or qk)) * LSE_BYTES, exact=False)
        yield Kernel("add_slots", "backward", "copy", bytes=parts, moved=parts)


def decode(call: Call, softmax: SoftmaxPlan, choice: Choice) -> Iterator[Kernel]:
    (qk, v), shape = call.dims(softmax), _shape(call, softmax, choice, "units_decode")
    lists = call.lists(choice, softmax)
    sets = call.count.units(choice, call.length - 1, 0, Trace())
    units = min(sets.room, size(sets.forced) + size(sets.free))
    blocks = call.many(lists * units * (choice.unit // shape.config.block_n), choice.sized)
    area, row = shape.config.block_m * shape.config.block_n, (qk + v) * call.shape.size
    listed = call.list_bytes(choice, softmax)
    read = call.count.read(softmax)
    own = call.rows_bytes(softmax, qk + v)
    yield Kernel(
        f"{softmax.name}_decode", "attend", "decode",
        flops=call.many(step_pairs(call, softmax), read.keys.exact) * (2 * (qk + v)),
        machine=blocks * (2 * area * sum(call.tile_dims(softmax))), exps=blocks * area,
        bytes=call.thinned(softmax, read.bytes) + own + listed,
        moved=call.many(lists * min(units * choice.unit, call.length) * row, choice.sized) + own + listed,
    )  # fmt: skip


def splits(call: Call, softmax: SoftmaxPlan) -> int:
    """In how many parts the units of a list are visited."""
    choice = softmax.units
    assert choice is not None
    width = max(1, min(call.capacity(choice), -(-call.length // choice.unit)))
    return call.machine.splits(call.shape.batch * call.lists(choice, softmax), min(call.length, width * choice.unit))


def select(call: Call, plan: ChoicePlan) -> Iterator[Kernel]:
    """Scores again what the coarse softmax scored, each entry once, and some ahead of a program's first units."""
    choice, softmax = plan.choice, _scoring(call, plan)
    qk, _ = call.dims(softmax)
    pairs = _scored_pairs(call, softmax)
    moved = call.rows_bytes(softmax, qk) + scored_bytes(call, softmax) + call.list_bytes(choice, softmax)
    name = f"{choice.name}_select"
    if not ranked(choice):
        yield _by_torch(call, plan, softmax, moved)
        return
    group, lists = call.group(choice, softmax), call.lists(choice, softmax)
    make = call.machine.unit_step if call.phase is Phase.DECODE else call.machine.unit_shape
    shape = make("select", max(qk, 16), call.shape.size, group, MOST_UNIT)
    most = call.capacity(choice)
    ranks = max(shape.config.block_n, 1 << max(1, (most - 1).bit_length()), 16)
    units = -(-call.length // choice.unit)
    if call.phase is Phase.DECODE:
        rows, splits = -(-units // ranks), call.machine.select_splits(call.shape.batch * lists, units)
        programs = splits
    else:
        rows, splits = select_steps(call.count, choice, shape.lanes, ranks, call.plan.pattern.causal), 1
        programs = -(-call.count.length // shape.lanes)
    ahead = plan.reach * (len(plan.weights) - plan.ahead)
    products = call.many((rows * (len(plan.weights) - plan.shared) + programs * ahead) * lists)
    area = shape.config.block_m * ranks
    assert choice.score is not None
    exps = products * area if choice.score.probability else NONE
    yield Kernel(
        name, "select", "select", flops=pairs * (2 * qk),
        machine=products * (2 * area * padded(qk)), exps=exps, bytes=moved, moved=moved,
    )  # fmt: skip
    if splits > 1:
        kept = call.many(lists * splits * (1 << max(1, (most - 1).bit_length())) * 8)
        yield Kernel("merge_ranks", "select", "copy", bytes=kept, moved=kept)


def _scoring(call: Call, plan: ChoicePlan) -> SoftmaxPlan:
    assert plan.choice.score is not None
    name = plan.choice.score.softmax.name
    return next(one for one in call.count.plan.softmaxes if one.name == name)


def _scored_pairs(call: Call, softmax: SoftmaxPlan) -> Number:
    if call.phase is Phase.DECODE:
        return call.many(step_pairs(call, softmax))
    return call.pairs(softmax) * call.shape.batch


def scored_bytes(call: Call, softmax: SoftmaxPlan) -> Number:
    heads, qk, _ = call.count.stream(softmax.sweeps[0].stream)
    return call.many(heads * call.count.entries(softmax.sweeps[0].stream) * qk * call.shape.size)


def _by_torch(call: Call, plan: ChoicePlan, softmax: SoftmaxPlan, moved: Number) -> Kernel:
    """Lists that no kernel ranks: all scores of all entries, hidden ones too, in memory."""
    qk, _ = call.dims(softmax)
    heads = call.count.heads(softmax.softmax)
    every = call.many(heads * call.queries * call.count.entries(softmax.sweeps[0].stream))
    pairs = _scored_pairs(call, softmax)
    return Kernel(
        f"{plan.choice.name} by torch", "select", "select", launches=0, flops=pairs * (2 * qk),
        machine=every * (2 * qk), bytes=moved, moved=moved + every * (3 * LSE_BYTES),
    )  # fmt: skip
