"""operators: how many operators of torch a step runs, as counted in generated modules (`operators.toml`)."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from spdsl.cost.kernels import Call
from spdsl.ir.bias import Place
from spdsl.ir.pattern import Case, Choice, Merge, Phase, Query, Stream
from spdsl.ir.plan import ChoicePlan, SoftmaxPlan
from spdsl.ir.rule import Drawn
from spdsl.ir.schedule import Gradient, Kind, Side, Stage, Step, Walk
from spdsl.passes.joint import leaves
from spdsl.passes.schedule.buffers import sides
from spdsl.passes.schedule.entries import pool_of

Counts = dict[str, int]


def operators(call: Call, step: Step[Any]) -> int:
    """Of one turn, beside filling what the step writes."""
    if step.kernel or step.kind not in _RUN:
        return 0
    return _RUN[step.kind](call, step, table()[step.kind.value])


@cache
def table() -> dict[str, Counts]:
    return tomllib.loads((Path(__file__).parent / "operators.toml").read_text(encoding="utf-8"))


def _each(call: Call, step: Step[Any], counts: Counts) -> int:
    return counts["each"]


def _by_phase(call: Call, step: Step[Any], counts: Counts) -> int:
    """Lists made from a cache mind the lengths of its sequences."""
    if call.phase is Phase.TRAIN:
        return counts["train"]
    return counts["cached"] + counts.get("one_batch", 0) * (call.shape.batch == 1)


def _inverse(call: Call, step: Step[SoftmaxPlan] | Step[Walk], counts: Counts) -> int:
    """Short units are taken together first."""
    choice = step.of.choice if isinstance(step.of, Walk) else step.of.units
    assert choice is not None
    return counts["train"] + counts["short"] * choice.gathered


def _settle(call: Call, step: Step[tuple[Case, ...]], counts: Counts) -> int:
    return counts["each"] * len(step.of)


def _sums(call: Call, step: Step[tuple[Gradient, ...]], counts: Counts) -> int:
    return counts["each"] * len(step.of)


def _bias_sums(call: Call, step: Step[SoftmaxPlan], counts: Counts) -> int:
    """Each tensor is numbered once; tables of neighbouring rows are added before they are placed."""
    own = step.of.of_class or step.of
    read = own.learned_reads[step.index]
    numbered = any(other.tensor == read.tensor for other in own.learned_reads[: step.index])
    found = counts["each"] + (0 if numbered else counts["tensor"])
    if read.place is Place.TABLE:
        found += counts["table"] + (counts["tiles"] if own.units is None else 0)
    return found


def _map(call: Call, step: Step[Choice], counts: Counts) -> int:
    """Of a causal pattern a set is drawn once for all calls. Lists become maps alike, wherever they are from."""
    drawn = isinstance(step.of.rule, Drawn)
    if drawn and call.plan.pattern.causal:
        return counts["drawn_before"]
    source = "drawn" if drawn else "given"
    return counts[f"{source}_{'train' if call.phase is Phase.TRAIN else 'cached'}"]


def _merge(call: Call, step: Step[Merge], counts: Counts) -> int:
    return counts["each"] + counts["part"] * len(leaves(step.of))


def _side(call: Call, step: Step[Side], counts: Counts) -> int:
    """By torch; where cells may be clipped, absent tokens are masked."""
    return _pool(counts, step.of.stream)


def _pools(call: Call, step: Step[Stream], counts: Counts) -> int:
    """Where both batch and entries are more than one, cells put heads first."""
    one = _pool(counts, step.of) + counts.get(f"{pool_of(step.of).name}_one_batch", 0) * (call.shape.batch == 1)
    return one * len(sides(call.plan, step.of))


def _pool(counts: Counts, stream: Stream) -> int:
    name = pool_of(stream).name
    return counts[name] + counts.get(f"{name}_clipped", 0) * stream.grid.is_clipped


def _of_rows(call: Call, step: Step[Any], counts: Counts) -> int:
    """Of queries by how they are pooled, of parts and of lists; a cache does not say where its sequences begin."""
    of = step.of.by if isinstance(step.of, Query) else "list" if isinstance(step.of, ChoicePlan) else "part"
    if of == "tail":
        return counts[of]  # a view
    if call.phase is Phase.DECODE:
        return counts["step"]  # the numbers of cells
    return counts[of if call.stage is Stage.BACKWARD else f"{of}_{'train' if call.phase is Phase.TRAIN else 'cached'}"]


def _short(call: Call, step: Step[Stream], counts: Counts) -> int:
    """Of keys alone: scores read no values."""
    return counts[pool_of(step.of).name]


_RUN: dict[Kind, Callable[[Call, Step[Any], Counts], int]] = {
    Kind.MAP: _map,
    Kind.SORT: _each,
    Kind.POOL_QUERIES: _of_rows,
    Kind.POOL_QUERIES_BACK: _of_rows,
    Kind.SPREAD_ROWS: _of_rows,
    Kind.SPREAD_ROWS_BACK: _of_rows,
    Kind.CLASSES: _by_phase,
    Kind.CLASSES_BACK: _by_phase,
    Kind.TILES: _by_phase,
    Kind.UNIONS: _by_phase,
    Kind.INVERSE: _inverse,
    Kind.PAIRS: _by_phase,
    Kind.LIMITS: _each,
    Kind.SETS: _each,
    Kind.HOLDS: _each,
    Kind.SETTLE: _settle,
    Kind.LSES: _each,
    Kind.MERGE_BY_TORCH: _merge,
    Kind.MERGE_BACK: _merge,
    Kind.BIAS_SUMS: _bias_sums,
    Kind.ADD_FRONT: _each,
    Kind.SINK_GRADIENT: _each,
    Kind.SUMS: _sums,
    Kind.KEY_PARTS: _each,
    Kind.ENTRIES: _side,
    Kind.SPREAD_ENTRIES: _side,
    Kind.WEIGHTS_BACK: _each,
    Kind.POOL_CELLS: _pools,
    Kind.CLOSE_SHORT: _short,
}
