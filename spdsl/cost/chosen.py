"""chosen: the kernels that choose units and those that walk them, and the lists that torch makes for them.

A softmax over units and a divergence over them walk alike: `Walked` is what they have in common.
"""

from __future__ import annotations

from dataclasses import dataclass

from spdsl.cost.attend import step_pairs
from spdsl.cost.kernels import INDEX_BYTES, LSE_BYTES, NONE, Call, Kernel
from spdsl.cost.machine import padded
from spdsl.cost.unions import select_steps, tile_units
from spdsl.ir.pattern import Choice, Phase
from spdsl.ir.plan import ChoicePlan, SoftmaxPlan
from spdsl.ir.schedule import Step, Walk
from spdsl.passes.count import Number
from spdsl.passes.series import Trace
from spdsl.passes.spans import size
from spdsl.runtime.tuning.configs import table_dim
from spdsl.runtime.tuning.unit_configs import MOST_UNIT, UnitShape, cut_pieces, tile_of_lists


@dataclass(frozen=True, slots=True)
class Walked:
    """Whose lists are walked, in tiles of which shape."""

    choice: Choice
    softmax: SoftmaxPlan  # whose heads have the lists
    shape: UnitShape


def walked(call: Call, step: Step[SoftmaxPlan] | Step[Walk], table: str = "") -> Walked:
    """In the tiles of `table`, by default those of the step."""
    of = step.of
    if isinstance(of, Walk):
        softmax, choice, dims = of.target, of.choice, (call.dims(of.target)[0], call.dims(of.score)[0])
    else:
        assert of.units is not None
        softmax, choice, dims = of, of.units, call.dims(of)
    make = call.machine.unit_step if call.phase is Phase.DECODE else call.machine.unit_shape
    name = table or step.table
    shape = make(name, table_dim(name, *dims), call.shape.size, call.group(choice, softmax), choice.unit)
    return Walked(choice, softmax, shape)


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


def mapped(call: Call, step: Step[Choice]) -> Kernel:
    """A byte for each unit of each tile of rows; drawn ones are alike for all sequences."""
    choice, given = step.of, step.of.given
    heads = call.shape.heads if choice.share == "head" else call.shape.kv_heads
    tiles, units = -(-call.queries // choice.rows), -(-call.length // choice.unit)
    moved = Number(heads * tiles * units * (call.shape.batch if given else 1))
    return Kernel(step.name, "lists", "copy", bytes=moved, moved=moved)


def unions(call: Call, step: Step[SoftmaxPlan] | Step[Walk]) -> Kernel:
    found = walked(call, step)
    moved = union_bytes(call, found.softmax, found.choice, found.shape.lanes)
    return Kernel(step.name, "lists", "copy", bytes=moved, moved=moved)


def other_tiles(call: Call, step: Step[SoftmaxPlan] | Step[Walk]) -> bool:
    """Whether the tiles of dK and dV hold other queries than those of dQ."""
    return walked(call, step).shape.lanes != walked(call, step, "units_dq").shape.lanes


def inverse(call: Call, step: Step[SoftmaxPlan] | Step[Walk]) -> Kernel:
    """Sorted by unit: numbers and masks, read and written."""
    found = walked(call, step)
    moved = union_of(call, found.choice, found.softmax, found.shape.lanes) * (3 * (INDEX_BYTES + 8))
    return Kernel(step.name, "lists", "copy", bytes=moved, moved=moved)


def forward(call: Call, step: Step[SoftmaxPlan]) -> Kernel:
    (qk, v), softmax, found = call.dims(step.of), step.of, walked(call, step)
    blocks, area = _blocks(call, found), _area(found)
    moved, lanes = call.rows_bytes(softmax, qk + v) + call.keys_bytes(softmax), found.shape.lanes
    return Kernel(
        step.name, "attend", "units", flops=call.pairs(softmax) * (2 * (qk + v) * call.shape.batch),
        machine=blocks * (2 * area * sum(call.tile_dims(softmax))), exps=blocks * area,
        bytes=moved + call.list_bytes(found.choice, softmax),
        moved=moved + union_bytes(call, softmax, found.choice, lanes),
    )  # fmt: skip


def dq(call: Call, step: Step[SoftmaxPlan]) -> Kernel:
    softmax, found = step.of, walked(call, step)
    (qk, v), (wide_qk, wide_v) = call.dims(softmax), call.tile_dims(softmax)
    blocks, area = _blocks(call, found), _area(found)
    rows, keys = call.rows_bytes(softmax, qk + v), call.keys_bytes(softmax)
    lists = union_bytes(call, softmax, found.choice, found.shape.lanes)
    return Kernel(
        step.name, "backward", "units_backward", flops=call.pairs(softmax) * (2 * (2 * qk + v) * call.shape.batch),
        machine=blocks * (2 * area * (2 * wide_qk + wide_v)), exps=blocks * area,
        bytes=rows + rows + keys, moved=rows + rows + keys + lists,
    )  # fmt: skip


def dkdv(call: Call, step: Step[SoftmaxPlan]) -> Kernel:
    softmax, found = step.of, walked(call, step)
    (qk, v), (wide_qk, wide_v) = call.dims(softmax), call.tile_dims(softmax)
    blocks, area = _blocks(call, found), _area(found)
    moved = call.rows_bytes(softmax, qk + v) + call.keys_bytes(softmax) * 2
    return Kernel(
        step.name, "backward", "units_backward", flops=call.pairs(softmax) * (2 * (qk + v) * call.shape.batch),
        machine=blocks * (2 * area * (2 * wide_qk + 2 * wide_v)), exps=blocks * area, bytes=moved, moved=moved,
    )  # fmt: skip


def _blocks(call: Call, found: Walked) -> Number:
    """Blocks of keys of all tiles."""
    units = union_of(call, found.choice, found.softmax, found.shape.lanes)
    return units * (found.choice.unit // found.shape.config.block_n)


def _area(found: Walked) -> int:
    return found.shape.config.block_m * found.shape.config.block_n


def slots(call: Call, choice: Choice, lists: int, lanes: int, longest: int) -> int:
    """Room of a key head for the parts of units that several jobs of `longest` tiles share: sizes alone tell."""
    tiles = call.shape.batch * -(-call.length // lanes)
    width = max(1, min(call.capacity(choice) * lanes, -(-call.length // choice.unit)))
    return 2 * (tiles * width * lists // longest)


def decode(call: Call, step: Step[SoftmaxPlan]) -> Kernel:
    softmax, found = step.of, walked(call, step)
    (qk, v), choice = call.dims(softmax), found.choice
    lists = call.lists(choice, softmax)
    sets = call.count.units(choice, call.length - 1, 0, Trace())
    units = min(sets.room, size(sets.forced) + size(sets.free))
    blocks = call.many(lists * units * (choice.unit // found.shape.config.block_n), choice.sized)
    area, row = _area(found), (qk + v) * call.shape.size
    listed, own, read = call.list_bytes(choice, softmax), call.rows_bytes(softmax, qk + v), call.count.read(softmax)
    return Kernel(
        step.name, "attend", "decode",
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


def select(call: Call, step: Step[ChoicePlan]) -> Kernel:
    """One kernel that scores and ranks."""
    softmax, ranks = scoring(call, step.of), max(_select_shape(call, step).config.block_n, _kept(call, step), 16)
    return _scores(call, step, ranks, call.list_bytes(step.of.choice, softmax))


def merge_ranks(call: Call, step: Step[ChoicePlan]) -> Kernel:
    lists = call.lists(step.of.choice, scoring(call, step.of))
    moved = call.many(lists * select_splits(call, step) * _kept(call, step) * 8)
    return Kernel(step.name, "select", "copy", bytes=moved, moved=moved)


def score_units(call: Call, step: Step[ChoicePlan]) -> Kernel:
    """The scores of all units, in memory."""
    return _scores(call, step, max(_select_shape(call, step).config.block_n, 16), _scores_bytes(call, step))


def cut(call: Call, step: Step[ChoicePlan]) -> Kernel:
    """Lists of scores. What is read again, caches have."""
    out = call.list_bytes(step.of.choice, scoring(call, step.of))
    return Kernel(step.name, "select", "copy", bytes=out, moved=_scores_bytes(call, step) + out)


def pieces(call: Call, step: Step[ChoicePlan]) -> int:
    """Turns of rows whose scores have room together."""
    choice, shape = step.of.choice, _select_shape(call, step)
    lists, units = call.lists(choice, scoring(call, step.of)), max(1, -(-call.length // choice.unit))
    tiles, each = -(-call.queries // shape.lanes) * call.shape.batch, shape.lanes
    if choice.rows > 1:  # a call may begin within a tile
        tiles, each = (call.queries + 2 * choice.rows - 2) // choice.rows * call.shape.batch, 1
    return len(list(cut_pieces(tiles, lists * each * units, call.machine.architecture is None)))


def _scores_bytes(call: Call, step: Step[ChoicePlan]) -> Number:
    choice = step.of.choice
    lists, units = call.lists(choice, scoring(call, step.of)), max(1, -(-call.length // choice.unit))
    return call.many(lists * -(-call.queries // choice.rows) * units * LSE_BYTES, exact=False)


def _scores(call: Call, step: Step[ChoicePlan], ranks: int, out: Number) -> Kernel:
    """The kernel that scores `ranks` units at once, each entry once, and some ahead of a program's first units.

    `out` are the bytes that it writes.
    """
    plan, softmax = step.of, scoring(call, step.of)
    choice, (qk, _), shape = plan.choice, call.dims(softmax), _select_shape(call, step)
    steps, programs = _select_steps(call, step, ranks)
    ahead = plan.reach * (len(plan.weights) - plan.ahead)
    lists = call.lists(choice, softmax)
    products = call.many((steps * (len(plan.weights) - plan.shared) + programs * ahead) * lists)
    area, read = shape.config.block_m * ranks, call.rows_bytes(softmax, qk) + scored_bytes(call, softmax)
    assert choice.score is not None
    return Kernel(
        step.name, "select", "select", flops=_scored_pairs(call, softmax) * (2 * qk),
        machine=products * (2 * area * padded(qk)), exps=products * area if choice.score.probability else NONE,
        bytes=read + call.list_bytes(choice, softmax), moved=read + out,
    )  # fmt: skip


def _select_steps(call: Call, step: Step[ChoicePlan], ranks: int) -> tuple[int, int]:
    """Rows of units, and programs, of one list: as often as a tile of queries that choose together has products."""
    choice, length, shape = step.of.choice, call.count.length, _select_shape(call, step)
    units = -(-length // choice.unit)
    most = -(-units // ranks)
    if call.phase is Phase.DECODE:
        return most, select_splits(call, step)
    rows = shape.lanes if choice.rows == 1 else choice.rows
    steps, tiles = select_steps(call.count, choice, rows, ranks, call.plan.pattern.causal), -(-length // rows)
    chunks, last = -(-rows // shape.lanes), -(-(length - (tiles - 1) * rows) // shape.lanes)
    behind = chunks - last  # products that the last tile lacks
    return steps * chunks - behind * most, tiles * chunks - behind


def scoring(call: Call, plan: ChoicePlan) -> SoftmaxPlan:
    """The softmax whose logits are the score."""
    assert plan.choice.score is not None
    name = plan.choice.score.softmax.name
    return next(one for one in call.count.plan.softmaxes if one.name == name)


def select_splits(call: Call, step: Step[ChoicePlan]) -> int:
    """Programs that share the units of a query."""
    if call.phase is not Phase.DECODE:
        return 1
    choice = step.of.choice
    groups = call.shape.batch * call.lists(choice, scoring(call, step.of))
    return call.machine.select_splits(groups, -(-call.length // choice.unit))


def _kept(call: Call, step: Step[ChoicePlan]) -> int:
    return 1 << max(1, (call.capacity(step.of.choice) - 1).bit_length())


def _select_shape(call: Call, step: Step[ChoicePlan]) -> UnitShape:
    softmax, choice = scoring(call, step.of), step.of.choice
    make = call.machine.unit_step if call.phase is Phase.DECODE else call.machine.unit_shape
    shape = make("select", max(call.dims(softmax)[0], 16), call.shape.size, call.group(choice, softmax), MOST_UNIT)
    return shape if choice.rows == 1 else tile_of_lists(shape, choice.rows)


def _scored_pairs(call: Call, softmax: SoftmaxPlan) -> Number:
    if call.phase is Phase.DECODE:
        return call.many(step_pairs(call, softmax))
    return call.pairs(softmax) * call.shape.batch


def scored_bytes(call: Call, softmax: SoftmaxPlan) -> Number:
    heads, qk, _ = call.count.stream(softmax.sweeps[0].stream)
    return call.many(heads * call.count.entries(softmax.sweeps[0].stream) * qk * call.shape.size)
