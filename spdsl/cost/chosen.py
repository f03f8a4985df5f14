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
from spdsl.runtime.tuning.unit_configs import MOST_UNIT, UnitShape, cut_pieces, tile_of_lists

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
    yield from (_ranked if ranked(plan.choice) else _cut)(call, plan)


def _ranked(call: Call, plan: ChoicePlan) -> Iterator[Kernel]:
    """One kernel that scores and ranks."""
    choice, softmax = plan.choice, _scoring(call, plan)
    shape, most = _select_shape(call, plan), call.capacity(choice)
    kept = 1 << max(1, (most - 1).bit_length())
    splits = _splits(call, plan)
    lists = call.list_bytes(choice, softmax)
    yield _scores(call, plan, shape, max(shape.config.block_n, kept, 16), lists, 1)
    if splits > 1:
        found = call.many(call.lists(choice, softmax) * splits * kept * 8)
        yield Kernel("merge_ranks", "select", "copy", bytes=found, moved=found)


def _cut(call: Call, plan: ChoicePlan) -> Iterator[Kernel]:
    """One kernel that scores, one that cuts lists, in pieces of the rows. What is read again, caches have."""
    choice, softmax = plan.choice, _scoring(call, plan)
    shape, lists = _select_shape(call, plan), call.lists(choice, softmax)
    units = max(1, -(-call.length // choice.unit))
    tiles, each = -(-call.queries // shape.lanes) * call.shape.batch, shape.lanes
    if choice.rows > 1:  # a call may begin within a tile
        tiles, each = (call.queries + 2 * choice.rows - 2) // choice.rows * call.shape.batch, 1
    pieces = len(list(cut_pieces(tiles, lists * each * units, call.machine.architecture is None)))
    scores = call.many(lists * -(-call.queries // choice.rows) * units * LSE_BYTES, exact=False)
    yield _scores(call, plan, shape, max(shape.config.block_n, 16), scores, pieces)
    out = call.list_bytes(choice, softmax)
    yield Kernel("cut_lists", "select", "copy", launches=pieces, bytes=out, moved=scores + out)


def _select_shape(call: Call, plan: ChoicePlan) -> UnitShape:
    choice, softmax = plan.choice, _scoring(call, plan)
    qk, _ = call.dims(softmax)
    make = call.machine.unit_step if call.phase is Phase.DECODE else call.machine.unit_shape
    shape = make("select", max(qk, 16), call.shape.size, call.group(choice, softmax), MOST_UNIT)
    return shape if choice.rows == 1 else tile_of_lists(shape, choice.rows)


def _splits(call: Call, plan: ChoicePlan) -> int:
    """Programs that share the units of one query."""
    if call.phase is not Phase.DECODE:
        return 1
    units = -(-call.length // plan.choice.unit)
    return call.machine.select_splits(call.shape.batch * call.lists(plan.choice, _scoring(call, plan)), units)


def _scores(call: Call, plan: ChoicePlan, shape: UnitShape, ranks: int, out: Number, launches: int) -> Kernel:
    """The kernel that scores `ranks` units at once; `out` are the bytes that it writes."""
    choice, softmax = plan.choice, _scoring(call, plan)
    qk, _ = call.dims(softmax)
    steps, programs = _select_steps(call, plan, shape, ranks)
    ahead = plan.reach * (len(plan.weights) - plan.ahead)
    lists = call.lists(choice, softmax)
    products = call.many((steps * (len(plan.weights) - plan.shared) + programs * ahead) * lists)
    area = shape.config.block_m * ranks
    assert choice.score is not None
    exps = products * area if choice.score.probability else NONE
    read = call.rows_bytes(softmax, qk) + scored_bytes(call, softmax)
    return Kernel(
        f"{choice.name}_select", "select", "select", launches=launches, flops=_scored_pairs(call, softmax) * (2 * qk),
        machine=products * (2 * area * padded(qk)), exps=exps,
        bytes=read + call.list_bytes(choice, softmax), moved=read + out,
    )  # fmt: skip


def _select_steps(call: Call, plan: ChoicePlan, shape: UnitShape, ranks: int) -> tuple[int, int]:
    """Rows of units, and programs, of one list: as often as a tile of queries that choose together has products."""
    choice, length = plan.choice, call.count.length
    units = -(-length // choice.unit)
    most = -(-units // ranks)
    if call.phase is Phase.DECODE:
        return most, _splits(call, plan)
    rows = shape.lanes if choice.rows == 1 else choice.rows
    steps, tiles = select_steps(call.count, choice, rows, ranks, call.plan.pattern.causal), -(-length // rows)
    chunks, last = -(-rows // shape.lanes), -(-(length - (tiles - 1) * rows) // shape.lanes)
    behind = chunks - last  # products that the last tile lacks
    return steps * chunks - behind * most, tiles * chunks - behind


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
