"""choose: the kernels that make the lists of a choice, and the maps of given and drawn units."""

from __future__ import annotations

from spdsl.cost.attend import step_pairs
from spdsl.cost.kernels import INDEX_BYTES, LSE_BYTES, NONE, Call, Kernel
from spdsl.cost.unions import select_steps
from spdsl.ir.pattern import Choice, Phase
from spdsl.ir.plan import ChoicePlan, SoftmaxPlan
from spdsl.ir.schedule import Kind, Step
from spdsl.passes.count import Number
from spdsl.runtime.tuning.unit_configs import MOST_UNIT, UnitShape, cut_pieces, tile_of_lists, tile_of_ranks


def mapped(call: Call, step: Step[Choice]) -> Kernel:
    """A byte for each unit of each tile of rows; drawn ones are alike for all sequences."""
    choice, by_sequence = step.of, step.of.given or step.of.selected
    heads = call.shape.heads if choice.share == "head" else call.shape.kv_heads
    tiles, units = -(-call.queries // choice.rows), -(-call.length // choice.unit)
    moved = Number(heads * tiles * units * (call.shape.batch if by_sequence else 1))
    return Kernel(step.name, "lists", "copy", bytes=moved, moved=moved)


def sorted_list(call: Call, step: Step[Choice]) -> Kernel:
    """Lists in and out; torch sorts twice, numbers and places of 8 bytes."""
    choice = step.of
    heads = call.shape.heads if choice.share == "head" else call.shape.kv_heads
    numbers = Number(call.shape.batch * heads * call.queries * call.capacity(choice), exact=False)
    return Kernel(step.name, "lists", "copy", bytes=numbers * 2 * INDEX_BYTES, moved=numbers * (2 * INDEX_BYTES + 48))


def limits(call: Call, step: Step[ChoicePlan]) -> Kernel:
    """A few numbers for each list."""
    return Kernel(step.name, "select", "copy")


def sets(call: Call, step: Step[ChoicePlan]) -> Kernel:
    """A byte for each unit of each tile, and a pass of torch over the tokens of each."""
    choice = step.of.choice
    heads, tiles = call.lists(choice, scoring(call, step.of)), -(-call.queries // choice.rows)
    out = call.many(heads * tiles * -(-call.length // choice.unit))
    asked = call.many(call.count.heads(scoring(call, step.of).softmax) * tiles * call.length)
    return Kernel(step.name, "select", "copy", bytes=out, moved=out + asked)


def select(call: Call, step: Step[ChoicePlan]) -> Kernel:
    """One kernel that scores and ranks."""
    ranks = max(_select_shape(call, step).config.block_n, _kept(call, step), 16)
    return _scores(call, step, ranks, _made_bytes(call, step))


def merge_ranks(call: Call, step: Step[ChoicePlan]) -> Kernel:
    lists = call.lists(step.of.choice, scoring(call, step.of))
    moved = call.many(lists * select_splits(call, step) * _kept(call, step) * 8)
    return Kernel(step.name, "select", "copy", bytes=moved, moved=moved)


def score_units(call: Call, step: Step[ChoicePlan]) -> Kernel:
    """The scores of all units, in memory."""
    return _scores(call, step, max(_select_shape(call, step).config.block_n, 16), _scores_bytes(call, step))


def cut(call: Call, step: Step[ChoicePlan]) -> Kernel:
    """Lists of scores. What is read again, caches have."""
    out = _made_bytes(call, step)
    return Kernel(step.name, "select", "copy", bytes=out, moved=_scores_bytes(call, step) + out)


def pieces(call: Call, step: Step[ChoicePlan]) -> int:
    """Turns of rows whose scores have room together."""
    choice, shape = step.of.choice, _select_shape(call, step)
    lists, units = call.lists(choice, scoring(call, step.of)), max(1, -(-call.length // choice.unit))
    rows = _room(call, choice)
    tiles, each = -(-rows // shape.lanes) * call.shape.batch, shape.lanes
    if choice.for_all:
        tiles, each = call.shape.batch, 1
    elif choice.together > 1:  # a call may begin within a tile
        tiles, each = (rows + 2 * choice.together - 2) // choice.together * call.shape.batch, 1
    return len(list(cut_pieces(tiles, lists * each * units, call.machine.architecture is None)))


def _room(call: Call, choice: Choice) -> int:
    """Rows of the score; with a cache a call may begin within a cell."""
    within = call.phase is Phase.PREFILL and choice.grain > 1
    return (
        min(call.queries, (call.queries + 2 * choice.grain - 2) // choice.grain) if within else call.rows(choice.grain)
    )


def _made_bytes(call: Call, step: Step[ChoicePlan]) -> Number:
    """The lists that kernels make, before queries get theirs."""
    return call.list_bytes(step.of.choice, scoring(call, step.of), step.of.choice.grain)


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
        step.name, "select", "select", flops=scored_pairs(call, softmax) * call.pair_flops(step.kind, softmax),
        machine=products * (area * call.tile_flops(step.kind, softmax)),
        exps=products * area if choice.score.probability else NONE,
        bytes=read + _made_bytes(call, step), moved=read + out,
    )  # fmt: skip


def _select_steps(call: Call, step: Step[ChoicePlan], ranks: int) -> tuple[int, int]:
    """Rows of units, and programs, of one list: as often as a tile of queries that choose together has products."""
    choice, length, shape = step.of.choice, call.count.length, _select_shape(call, step)
    units = -(-length // choice.unit)
    most = -(-units // ranks)
    if call.phase is Phase.DECODE:
        return most, select_splits(call, step)
    if choice.for_all:  # few lists: programs share the units, each goes over all rows
        chunks = -(-call.rows_of(scoring(call, step.of)) // shape.lanes)
        return most * chunks, select_splits(call, step) * chunks
    rows, own = shape.lanes if choice.together == 1 else choice.together, call.rows(choice.grain)
    steps = select_steps(call.count, choice, rows * choice.grain, ranks, call.plan.pattern.causal)
    tiles, chunks = -(-own // rows), -(-rows // shape.lanes)
    last = -(-(own - (tiles - 1) * rows) // shape.lanes)
    behind = chunks - last  # products that the last tile lacks
    return steps * chunks - behind * most, tiles * chunks - behind


def scoring(call: Call, plan: ChoicePlan) -> SoftmaxPlan:
    """The softmax whose logits are the score."""
    assert plan.choice.score is not None
    name = plan.choice.score.softmax.name
    return next(one for one in call.count.plan.softmaxes if one.name == name)


def select_splits(call: Call, step: Step[ChoicePlan]) -> int:
    """Programs that share the units of a query."""
    choice = step.of.choice
    if call.phase is not Phase.DECODE and not choice.for_all:
        return 1
    groups = call.shape.batch * call.lists(choice, scoring(call, step.of))
    return call.machine.select_splits(groups, -(-call.length // choice.unit))


def _kept(call: Call, step: Step[ChoicePlan]) -> int:
    return 1 << max(1, (call.capacity(step.of.choice) - 1).bit_length())


def _select_shape(call: Call, step: Step[ChoicePlan]) -> UnitShape:
    softmax, choice = scoring(call, step.of), step.of.choice
    make = call.machine.unit_step if call.phase is Phase.DECODE else call.machine.unit_shape
    shape = make("select", max(call.dims(softmax)[0], 16), call.shape.size, call.group(choice, softmax), MOST_UNIT)
    if choice.together > 1:
        return shape if choice.for_all else tile_of_lists(shape, choice.together)
    return tile_of_ranks(shape, call.capacity(choice)) if step.kind is Kind.SELECT else shape


def scored_pairs(call: Call, softmax: SoftmaxPlan) -> Number:
    if call.phase is Phase.DECODE:
        return call.many(step_pairs(call, softmax))
    return call.pairs(softmax) * call.shape.batch


def scored_bytes(call: Call, softmax: SoftmaxPlan) -> Number:
    heads, qk, _ = call.count.stream(softmax.sweeps[0].stream)
    return call.many(heads * call.count.entries(softmax.sweeps[0].stream) * qk * call.shape.size)
