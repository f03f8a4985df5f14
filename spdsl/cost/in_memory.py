"""in_memory: the kernel and the operators of torch that make scores of units which stand in memory first."""

from __future__ import annotations

from math import ceil

from spdsl.cost.choose import scored_bytes, scored_pairs, scoring
from spdsl.cost.kernels import LSE_BYTES, Call, Kernel
from spdsl.ir.pattern import Phase
from spdsl.ir.plan import ChoicePlan
from spdsl.ir.schedule import Step
from spdsl.passes.count import Number
from spdsl.passes.schedule.choose import scorings
from spdsl.runtime.tuning.unit_configs import CELL_LANES, cut_pieces

PASSES = 8  # over the products, by which torch makes scores of them: masks, log-sum-exp, exponentials, sums


def multiply_cells(call: Call, step: Step[ChoicePlan]) -> Kernel:
    """One product for each query of a cell, of pairs of which one is seen; padding of blocks is not counted."""
    choice, softmax = step.of.choice, scorings(call.plan, step.of)[step.index]
    assert choice.score is not None
    qk, cells = call.dims(softmax)[0], choice.score.grain.cells
    pairs = scored_pairs(call, softmax)
    flops = Number(2 * qk * ceil(pairs.value / cells), exact=False)
    read = call.rows_bytes(softmax, qk) + scored_bytes(call, softmax)
    return Kernel(
        step.name, "select", "select", flops=flops, machine=flops, bytes=read, moved=read + _products(call, step)
    )  # fmt: skip


def scores_of_units(call: Call, step: Step[ChoicePlan]) -> Kernel:
    """By torch, from the products of all softmaxes of the score."""
    moved = _products(call, step) * (PASSES * len(scorings(call.plan, step.of)))
    return Kernel(step.name, "select", "copy", bytes=_products(call, step), moved=moved)


def pieces(call: Call, step: Step[ChoicePlan]) -> int:
    """Turns of rows whose products, and whose scores of units, have room together."""
    choice = step.of.choice
    lists, units = call.lists(choice, scoring(call, step.of)), max(1, -(-call.length // choice.unit))
    lanes = 1 if call.phase is Phase.DECODE else CELL_LANES
    tiles, own = -(-call.queries // lanes) * call.shape.batch, lanes
    if choice.rows > 1:  # a call may begin within a tile
        tiles, own = (call.queries + 2 * choice.rows - 2) // choice.rows * call.shape.batch, 1
    room = lists * own * units, _numbers(call, step.of, own)
    return len(list(cut_pieces(tiles, max(room), call.machine.architecture is None)))


def _numbers(call: Call, plan: ChoicePlan, own: int) -> int:
    """Products of a tile of `own` lists."""
    score = plan.choice.score
    assert score is not None
    heads, found = call.count.heads(scoring(call, plan).softmax), 0
    for softmax in scorings(call.plan, plan):
        stride = score.grain.grid(softmax.sweeps[0].stream.grid).stride
        found += heads * max(1, plan.choice.rows // score.grain.cells) * own * max(1, -(-call.length // stride))
    return found


def _products(call: Call, step: Step[ChoicePlan]) -> Number:
    """Bytes of those of one softmax."""
    choice = step.of.choice
    numbers = _numbers(call, step.of, 1) // len(scorings(call.plan, step.of))
    return call.many(-(-call.queries // choice.rows) * numbers * LSE_BYTES, exact=False)
