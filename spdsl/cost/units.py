"""units: the kernels that walk the units of a choice, and the lists that torch makes for them.

A softmax over units and a divergence over them walk alike: `Walked` is what they have in common.
"""

from __future__ import annotations

from dataclasses import dataclass

from spdsl.cost.attend import step_pairs
from spdsl.cost.kernels import INDEX_BYTES, Call, Kernel
from spdsl.cost.unions import tile_blocks, tile_units
from spdsl.ir.pattern import Choice, Phase
from spdsl.ir.plan import SoftmaxPlan
from spdsl.ir.schedule import Step, Walk
from spdsl.passes.count import Number
from spdsl.passes.series import Trace
from spdsl.passes.spans import size
from spdsl.runtime.tuning.configs import table_dim
from spdsl.runtime.tuning.unit_configs import UnitShape, mask_words


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
    unit = choice.whole_unit if name == "units_dkdv" else choice.unit
    shape = make(name, table_dim(name, *dims), call.shape.size, call.group(choice, softmax), unit)
    return Walked(choice, softmax, shape)


def whole_unions(call: Call, found: Walked) -> Number:
    """Whole units of all tiles of all lists of the batch."""
    return _of_all(call, found, tile_units(call.count, found.choice, found.shape.lanes, call.options.overlap, True))


def visited_keys(call: Call, found: Walked) -> Number:
    """Keys of the blocks that all tiles visit, over all lists of the batch."""
    choice, block = found.choice, found.shape.config.block_n
    tiles = call.count, choice, found.shape.lanes, call.options.overlap
    own = tile_blocks(*tiles, block) * block if choice.gathered else tile_units(*tiles) * choice.unit
    return _of_all(call, found, own)


def _of_all(call: Call, found: Walked, number: Number) -> Number:
    """Of lists that the caller gives the declared share."""
    own = number * (call.lists(found.choice, found.softmax) * call.shape.batch)
    return call.thinned(found.softmax, own) if found.choice.given else own


def union_bytes(call: Call, softmax: SoftmaxPlan, choice: Choice, lanes: int) -> Number:
    """Lists in, units and masks out, both padded to the room of a tile."""
    tiles = -(-call.queries // lanes)
    width = max(1, min(call.capacity(choice) * lanes, -(-call.length // choice.unit)))
    out = call.many(tiles * call.lists(choice, softmax) * width * (INDEX_BYTES + 8), exact=not choice.given)
    return call.list_bytes(choice, softmax) + out


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
    words = mask_words(found.choice.whole_unit // found.choice.unit, found.shape.lanes)
    moved = whole_unions(call, found) * (3 * (INDEX_BYTES + 8 * words))
    return Kernel(step.name, "lists", "copy", bytes=moved, moved=moved)


def forward(call: Call, step: Step[SoftmaxPlan]) -> Kernel:
    (qk, v), softmax, found = call.dims(step.of), step.of, walked(call, step)
    blocks, area = _blocks(call, found), _area(found)
    moved, lanes = call.rows_bytes(softmax, qk + v) + call.keys_bytes(softmax), found.shape.lanes
    return Kernel(
        step.name, "attend", "units", flops=call.visible_flops(step),
        machine=blocks * (area * call.tile_flops(step.kind, softmax)), exps=blocks * area,
        bytes=moved + call.list_bytes(found.choice, softmax),
        moved=moved + union_bytes(call, softmax, found.choice, lanes),
    )  # fmt: skip


def dq(call: Call, step: Step[SoftmaxPlan]) -> Kernel:
    softmax, found = step.of, walked(call, step)
    qk, v = call.dims(softmax)
    blocks, area = _blocks(call, found), _area(found)
    rows, keys = call.rows_bytes(softmax, qk + v), call.keys_bytes(softmax)
    lists = union_bytes(call, softmax, found.choice, found.shape.lanes)
    return Kernel(
        step.name, "backward", "units_backward", flops=call.visible_flops(step),
        machine=blocks * (area * call.tile_flops(step.kind, softmax)), exps=blocks * area,
        bytes=rows + rows + keys, moved=rows + rows + keys + lists,
    )  # fmt: skip


def dkdv(call: Call, step: Step[SoftmaxPlan]) -> Kernel:
    softmax, found = step.of, walked(call, step)
    qk, v = call.dims(softmax)
    per_unit, area = found.choice.whole_unit // found.shape.config.block_n, _area(found)
    blocks = whole_unions(call, found) * per_unit
    moved = call.rows_bytes(softmax, qk + v) + call.keys_bytes(softmax) * 2
    return Kernel(
        step.name, "backward", "units_backward", flops=call.visible_flops(step),
        machine=blocks * (area * call.tile_flops(step.kind, softmax)), exps=blocks * area, bytes=moved, moved=moved,
    )  # fmt: skip


def _blocks(call: Call, found: Walked) -> Number:
    """Blocks of keys of all tiles."""
    keys = visited_keys(call, found)
    return Number(keys.value // found.shape.config.block_n, keys.exact)


def _area(found: Walked) -> int:
    return found.shape.config.block_m * found.shape.config.block_n


def slots(call: Call, choice: Choice, lists: int, lanes: int, longest: int) -> int:
    """Room of a key head for the parts of units that several jobs of `longest` tiles share: sizes alone tell."""
    tiles = call.shape.batch * -(-call.length // lanes)
    width = max(1, min(call.capacity(choice) * lanes, -(-call.length // choice.whole_unit)))
    return 2 * (tiles * width * lists // longest)


def decode(call: Call, step: Step[SoftmaxPlan]) -> Kernel:
    softmax, found = step.of, walked(call, step)
    (qk, v), choice = call.dims(softmax), found.choice
    lists = call.lists(choice, softmax)
    sets = call.count.units(choice, call.length - 1, 0, Trace())
    units = min(sets.room, size(sets.forced) + size(sets.free))
    listed = call.many(lists * -(-units * choice.unit // found.shape.config.block_n), choice.sized)
    blocks = call.thinned(softmax, listed) if choice.given else listed
    area, row = _area(found), (qk + v) * call.shape.size
    list_bytes, own = call.list_bytes(choice, softmax), call.rows_bytes(softmax, qk + v)
    keys, read = call.many(lists * min(units * choice.unit, call.length) * row, choice.sized), call.count.read(softmax)
    seen = call.many(step_pairs(call, softmax), read.keys.exact)
    return Kernel(
        step.name, "attend", "decode",
        flops=call.thinned(softmax, seen) * call.pair_flops(step.kind, softmax),
        machine=blocks * (area * call.tile_flops(step.kind, softmax)), exps=blocks * area,
        bytes=call.thinned(softmax, read.bytes) + own + list_bytes,
        moved=(call.thinned(softmax, keys) if choice.given else keys) + own + list_bytes,
    )  # fmt: skip


def splits(call: Call, softmax: SoftmaxPlan) -> int:
    """In how many parts the units of a list are visited."""
    choice = softmax.units
    assert choice is not None
    width = max(1, min(call.capacity(choice), -(-call.length // choice.unit)))
    return call.machine.splits(call.shape.batch * call.lists(choice, softmax), min(call.length, width * choice.unit))
