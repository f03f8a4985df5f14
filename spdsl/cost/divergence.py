"""divergence: the kernels of a divergence over the units of lists, and those of its score's gradient."""

from __future__ import annotations

from spdsl.cost.choose import scored_bytes
from spdsl.cost.kernels import LSE_BYTES, NONE, Call, Kernel
from spdsl.cost.machine import padded
from spdsl.cost.units import slots, union_bytes, visited_keys, walked, whole_unions
from spdsl.ir.schedule import Step, Walk
from spdsl.passes.count import Number
from spdsl.runtime.tuning.configs import power_of_2
from spdsl.runtime.tuning.unit_configs import UnitShape

PLACES = 3  # exponentials and logarithms of the sums that a key and a query have once


def forward(call: Call, step: Step[Walk]) -> Kernel:
    walk, found = step.of, walked(call, step)
    shape, keys = found.shape, visited_keys(call, found)
    moved = _rows_bytes(call, walk) + _keys_bytes(call, walk)
    return Kernel(
        step.name, "extra", "units", flops=_flops(call, walk, (1, 1)),
        machine=_machine(call, walk, shape, keys, (1, 1)),
        exps=_exps(shape, keys), bytes=moved + call.list_bytes(walk.choice, walk.target),
        moved=moved + union_bytes(call, walk.target, walk.choice, shape.lanes),
    )  # fmt: skip


def dq(call: Call, step: Step[Walk]) -> Kernel:
    """As dk, computes target and score again; the score alone learns."""
    walk, found = step.of, walked(call, step)
    shape, keys = found.shape, visited_keys(call, found)
    own = call.rows_bytes(walk.score, call.dims(walk.score)[0])
    moved = _rows_bytes(call, walk) + _keys_bytes(call, walk) + own
    return Kernel(
        step.name, "extra", "units_backward", flops=_flops(call, walk, (1, 2)),
        machine=_machine(call, walk, shape, keys, (1, 2)), exps=_exps(shape, keys),
        bytes=moved, moved=moved + union_bytes(call, walk.target, walk.choice, shape.lanes),
    )  # fmt: skip


def dk(call: Call, step: Step[Walk]) -> Kernel:
    walk, found = step.of, walked(call, step)
    shape, keys = found.shape, whole_unions(call, found) * found.choice.whole_unit
    moved = _rows_bytes(call, walk) + _keys_bytes(call, walk) + _parts_bytes(call, walk)
    return Kernel(
        step.name, "extra", "units_backward", flops=_flops(call, walk, (0, 1)),
        machine=_machine(call, walk, shape, keys, (1, 2)), exps=_exps(shape, keys), bytes=moved, moved=moved,
    )  # fmt: skip


def add_slots(call: Call, step: Step[Walk]) -> Kernel:
    """Parts of several jobs, of each list."""
    walk, lists = step.of, call.lists(step.of.choice, step.of.target)
    numbers = lists * slots_of(call, step) * walk.choice.whole_unit * call.dims(walk.score)[0]
    parts = Number(numbers * LSE_BYTES, exact=False)
    return Kernel(step.name, "extra", "copy", bytes=parts, moved=parts)


def slots_of(call: Call, step: Step[Walk]) -> int:
    lanes = walked(call, step).shape.lanes
    return slots(call, step.of.choice, 1, lanes, call.machine.job_tiles(step.of.choice.whole_unit))


def key_parts(call: Call, step: Step[Walk]) -> Kernel:
    """Those of several lists, by torch."""
    moved = _parts_bytes(call, step.of) + scored_bytes(call, step.of.score)
    return Kernel(step.name, "extra", "copy", bytes=moved, moved=moved)


def shared(call: Call, walk: Walk) -> bool:
    """Whether a head of the score's keys has parts of several lists."""
    return call.lists(walk.choice, walk.target) > call.count.stream(walk.score.sweeps[0].stream)[0]


def _score_heads(call: Call, walk: Walk) -> int:
    """Of one list."""
    return call.count.heads(walk.score.softmax) // call.lists(walk.choice, walk.target)


def _machine(call: Call, walk: Walk, shape: UnitShape, keys: Number, times: tuple[int, int]) -> Number:
    """Products of the tiles and `keys`, so many times each for target and score."""
    score_rows = max(16, shape.lanes * power_of_2(_score_heads(call, walk)))
    sides = ((shape.config.block_m, walk.target), (score_rows, walk.score))
    of_key = sum(often * 2 * rows * padded(call.dims(one)[0]) for often, (rows, one) in zip(times, sides, strict=True))
    return keys * of_key


def _exps(shape: UnitShape, keys: Number) -> Number:
    return keys * (shape.config.block_m + PLACES * shape.lanes)


def _flops(call: Call, walk: Walk, times: tuple[int, int]) -> Number:
    """Pairs of the lists that the target sees."""
    found, pairs = NONE, call.pairs(walk.target)
    heads = call.count.heads(walk.target.softmax)
    for often, one in zip(times, (walk.target, walk.score), strict=True):
        own = Number(pairs.value // heads * call.count.heads(one.softmax), pairs.exact)
        found += own * (2 * call.dims(one)[0] * often * call.shape.batch)
    return found


def _rows_bytes(call: Call, walk: Walk) -> Number:
    """Queries and lse of the target, queries of the score, and three numbers for each list and query."""
    lists = call.lists(walk.choice, walk.target)
    of_lists = call.many(call.queries * lists * 3 * LSE_BYTES)
    return sum((call.rows_bytes(one, call.dims(one)[0]) for one in (walk.target, walk.score)), of_lists)


def _keys_bytes(call: Call, walk: Walk) -> Number:
    return scored_bytes(call, walk.target) + scored_bytes(call, walk.score)


def _parts_bytes(call: Call, walk: Walk) -> Number:
    lists, (_, qk, _) = call.lists(walk.choice, walk.target), call.count.stream(walk.score.sweeps[0].stream)
    return call.many(lists * call.length * qk * (LSE_BYTES if shared(call, walk) else call.shape.size))
