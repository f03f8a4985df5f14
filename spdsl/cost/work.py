"""work: the one way from each kind of step to what it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from spdsl.cost import (
    attend,
    bias,
    cache,
    choose,
    divergence,
    entries,
    extras,
    in_memory,
    pairs,
    query_cells,
    results,
    units,
)
from spdsl.cost.conditions import slots
from spdsl.cost.kernels import LSE_BYTES, Call, Kernel
from spdsl.ir.plan import SoftmaxPlan
from spdsl.ir.schedule import Kind, Step
from spdsl.passes.count import Number


def add_slots(call: Call, step: Step[SoftmaxPlan]) -> Kernel:
    """The parts of units that several jobs share: their room is known from sizes alone."""
    softmax = step.of
    assert softmax.units is not None
    heads, qk, v = call.count.stream(softmax.sweeps[0].stream)
    numbers = heads * slots(call, step) * softmax.units.whole_unit * (qk + (v or qk))
    parts = Number(numbers * LSE_BYTES, exact=False)
    return Kernel(step.name, "backward", "copy", bytes=parts, moved=parts)


WORK: dict[Kind, Callable[[Call, Step[Any]], Kernel]] = {
    Kind.MAP: choose.mapped,
    Kind.SORT: choose.sorted_list,
    Kind.APPEND_ROWS: cache.append_rows,
    Kind.APPEND_LENGTHS: cache.append_lengths,
    Kind.CLOSE_CELLS: cache.close_cells,
    Kind.TAKE_CELLS: cache.take_cells,
    Kind.POOL_CELLS: cache.pool_cells,
    Kind.PUT_ENTRIES: cache.put_entries,
    Kind.CLOSE_SHORT: cache.close_short,
    Kind.CLOSE_HIDDEN: cache.close_hidden,
    Kind.CLOSE_OUTPUTS: cache.close_outputs,
    Kind.ENTRIES: entries.entries,
    Kind.FIND_MAXIMA: entries.beside,
    Kind.SPREAD_ENTRIES: entries.spread_entries,
    Kind.WEIGHT_SUMS: entries.beside,
    Kind.WEIGHTS_BACK: entries.beside,
    Kind.POOL_QUERIES: query_cells.pooled,
    Kind.POOL_QUERIES_BACK: query_cells.pooled,
    Kind.SPREAD_ROWS: query_cells.spread,
    Kind.SPREAD_ROWS_BACK: query_cells.spread,
    Kind.CLASSES: attend.by_torch,
    Kind.TILES: attend.by_torch,
    Kind.FORWARD: attend.forward,
    Kind.DECODE: attend.decode,
    Kind.DELTA: attend.delta,
    Kind.DQ: attend.dq,
    Kind.DKDV: attend.dkdv,
    Kind.CLASSES_BACK: attend.by_torch,
    Kind.BIAS: bias.gradient,
    Kind.BIAS_SUMS: bias.sums,
    Kind.ADD_FRONT: attend.add_front,
    Kind.SINK_GRADIENT: results.sink_gradient,
    Kind.UNIONS: units.unions,
    Kind.UNIT_FORWARD: units.forward,
    Kind.UNIT_DECODE: units.decode,
    Kind.UNIT_DQ: units.dq,
    Kind.INVERSE: units.inverse,
    Kind.UNIT_DKDV: units.dkdv,
    Kind.ADD_SLOTS: add_slots,
    Kind.PAIRS: pairs.lists,
    Kind.PAIR_FORWARD: pairs.forward,
    Kind.MERGE_PAIRS: pairs.merge_pairs,
    Kind.PAIR_DQ: pairs.dq,
    Kind.ADD_PAIRS: pairs.add_pairs,
    Kind.PAIR_DKDV: pairs.dkdv,
    Kind.LIMITS: choose.limits,
    Kind.SELECT: choose.select,
    Kind.MERGE_RANKS: choose.merge_ranks,
    Kind.SETS: choose.sets,
    Kind.SCORE_UNITS: choose.score_units,
    Kind.CUT: choose.cut,
    Kind.MULTIPLY_CELLS: in_memory.multiply_cells,
    Kind.SCORES_OF_UNITS: in_memory.scores_of_units,
    Kind.HOLDS: results.small,
    Kind.GATE: results.combined,
    Kind.LSES: results.small,
    Kind.MERGE: results.combined,
    Kind.MERGE_BY_TORCH: results.combined,
    Kind.JOIN: results.joined,
    Kind.SETTLE: results.settled,
    Kind.GATE_BACK: results.uncombined,
    Kind.MERGE_BACK: results.uncombined,
    Kind.SUMS: results.sums,
    Kind.DIVERGENCE: divergence.forward,
    Kind.DIVERGENCE_DQ: divergence.dq,
    Kind.DIVERGENCE_DK: divergence.dk,
    Kind.ADD_KEY_SLOTS: divergence.add_slots,
    Kind.KEY_PARTS: divergence.key_parts,
    Kind.SCORES: extras.forward,
    Kind.SCORES_BACK: extras.backward,
}
