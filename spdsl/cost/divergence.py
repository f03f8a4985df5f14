"""divergence: the kernels of a divergence over the units of lists, and those of its score's gradient."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from spdsl.cost.chosen import INVERSE_STEPS, UNION_STEPS, scored_bytes, union_bytes, union_of
from spdsl.cost.kernels import INDEX_BYTES, LSE_BYTES, NONE, Call, Kernel
from spdsl.cost.machine import padded
from spdsl.ir.pattern import Choice
from spdsl.ir.plan import SoftmaxPlan
from spdsl.passes.count import Number
from spdsl.runtime.tuning.configs import power_of_2, table_dim
from spdsl.runtime.tuning.unit_configs import UnitShape

# Operators of torch, as the tests count them in generated modules.
FILL_STEPS, BACKWARD_STEPS = 3, 1  # results; dQ
PLACES = 3  # exponentials and logarithms of the sums that a key and a query have once


@dataclass(frozen=True, slots=True)
class Walk:
    """A divergence whose kernels walk the units of `choice`; `name` is that of the result."""

    name: str
    target: SoftmaxPlan
    score: SoftmaxPlan
    choice: Choice


def forward(call: Call, walk: Walk) -> Iterator[Kernel]:
    shape = _shape(call, walk, "units_dq")
    lists = union_bytes(call, walk.target, walk.choice, shape.lanes)
    moved = _rows_bytes(call, walk) + _keys_bytes(call, walk)
    yield _unions(call, walk, shape)
    yield Kernel(
        f"_{walk.name}_forward", "extra", "units", steps=FILL_STEPS,
        flops=_flops(call, walk, (1, 1)), machine=_machine(call, walk, shape, (1, 1)), exps=_exps(call, walk, shape),
        bytes=moved + call.list_bytes(walk.choice, walk.target), moved=moved + lists,
    )  # fmt: skip


def backward(call: Call, walk: Walk) -> Iterator[Kernel]:
    """Both kernels compute target and score again; the score alone learns."""
    shape = _shape(call, walk, "units_dq")
    lists = union_bytes(call, walk.target, walk.choice, shape.lanes)
    own = call.rows_bytes(walk.score, call.dims(walk.score)[0])
    moved = _rows_bytes(call, walk) + _keys_bytes(call, walk) + own
    yield _unions(call, walk, shape)
    yield Kernel(
        f"_{walk.name}_dq", "extra", "units_backward", steps=BACKWARD_STEPS,
        flops=_flops(call, walk, (1, 2)), machine=_machine(call, walk, shape, (1, 2)), exps=_exps(call, walk, shape),
        bytes=moved, moved=moved + lists,
    )  # fmt: skip
    lanes, shape = shape.lanes, _shape(call, walk, "units_dkdv")
    again = UNION_STEPS if shape.lanes != lanes else 0
    inverse = union_of(call, walk.choice, walk.target, shape.lanes) * (3 * (INDEX_BYTES + 8))
    yield Kernel(
        f"_{walk.name} inverse lists", "lists", "copy", launches=0, steps=INVERSE_STEPS + again,
        bytes=inverse, moved=inverse,
    )  # fmt: skip
    moved = _rows_bytes(call, walk) + _keys_bytes(call, walk) + _parts_bytes(call, walk)
    yield Kernel(
        f"_{walk.name}_dk", "extra", "units_backward",
        flops=_flops(call, walk, (0, 1)), machine=_machine(call, walk, shape, (1, 2)), exps=_exps(call, walk, shape),
        bytes=moved, moved=moved,
    )  # fmt: skip
    yield from _added(call, walk, shape.lanes)


def _shape(call: Call, walk: Walk, kernel: str) -> UnitShape:
    dim = table_dim(kernel, call.dims(walk.target)[0], call.dims(walk.score)[0])
    group = call.group(walk.choice, walk.target)
    return call.machine.unit_shape(kernel, dim, call.shape.size, group, walk.choice.unit)


def _score_heads(call: Call, walk: Walk) -> int:
    """Of one list."""
    return call.count.heads(walk.score.softmax) // call.lists(walk.choice, walk.target)


def _unions(call: Call, walk: Walk, shape: UnitShape) -> Kernel:
    lists = union_bytes(call, walk.target, walk.choice, shape.lanes)
    return Kernel(f"_{walk.name} unions", "lists", "copy", launches=0, steps=UNION_STEPS, bytes=lists, moved=lists)


def _keys(call: Call, walk: Walk, shape: UnitShape) -> Number:
    """Keys of the units that all tiles visit."""
    return union_of(call, walk.choice, walk.target, shape.lanes) * walk.choice.unit


def _machine(call: Call, walk: Walk, shape: UnitShape, times: tuple[int, int]) -> Number:
    """Products of the tiles, so many times each for target and score."""
    score_rows = max(16, shape.lanes * power_of_2(_score_heads(call, walk)))
    sides = ((shape.config.block_m, walk.target), (score_rows, walk.score))
    of_key = sum(often * 2 * rows * padded(call.dims(one)[0]) for often, (rows, one) in zip(times, sides, strict=True))
    return _keys(call, walk, shape) * of_key


def _exps(call: Call, walk: Walk, shape: UnitShape) -> Number:
    return _keys(call, walk, shape) * (shape.config.block_m + PLACES * shape.lanes)


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


def _shared(call: Call, walk: Walk) -> bool:
    """Whether a head of the score's keys has parts of several lists."""
    return call.lists(walk.choice, walk.target) > call.count.stream(walk.score.sweeps[0].stream)[0]


def _parts_bytes(call: Call, walk: Walk) -> Number:
    lists, (_, qk, _) = call.lists(walk.choice, walk.target), call.count.stream(walk.score.sweeps[0].stream)
    return call.many(lists * call.length * qk * (LSE_BYTES if _shared(call, walk) else call.shape.size))


def _added(call: Call, walk: Walk, lanes: int) -> Iterator[Kernel]:
    """Parts of several jobs: their room is known from sizes alone; then those of several lists, by torch."""
    choice, lists = walk.choice, call.lists(walk.choice, walk.target)
    tiles = call.shape.batch * -(-call.length // lanes)
    width = max(1, min(call.capacity(choice) * lanes, -(-call.length // choice.unit)))
    if slots := 2 * (tiles * width // call.machine.job_tiles(choice.unit)):
        parts = Number(lists * slots * choice.unit * call.dims(walk.score)[0] * LSE_BYTES, exact=False)
        yield Kernel("add_key_slots", "extra", "copy", bytes=parts, moved=parts)
    if _shared(call, walk):
        moved = _parts_bytes(call, walk) + scored_bytes(call, walk.score)
        steps = 1 + (call.shape.size < LSE_BYTES)  # the sum, and its cast
        yield Kernel(f"_{walk.name} parts", "extra", "copy", launches=0, steps=steps, bytes=moved, moved=moved)
