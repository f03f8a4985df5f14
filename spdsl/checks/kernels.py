"""The kernels that the schedules of a plan launch, with the configuration that the tables give them.

Of softmaxes and choices: those of divergences have no model of their footprint. Numbers that neither the pattern nor
`expect` fixes are those of `View.shape`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from spdsl.checks.view import View
from spdsl.diagnostics import Span
from spdsl.ir.pattern import Choice, Phase, Softmax, Stream, Tensor, Values
from spdsl.ir.plan import ChoicePlan, Plan, Role, SoftmaxPlan
from spdsl.ir.schedule import Schedule, Stage, Step
from spdsl.ir.symbols import lookup_name, lookups
from spdsl.passes.schedule import schedule, stages
from spdsl.passes.selection import MOST_RANKED, ranked
from spdsl.runtime.tuning.configs import TABLES, Config, chained, lookup, power_of_2, row_of_table, table_dim
from spdsl.runtime.tuning.footprint import KernelShape
from spdsl.runtime.tuning.unit_configs import (
    MOST_UNIT,
    UNIT_TABLES,
    UnitShape,
    fitted,
    one_query,
    page_of_block,
    rows_alone,
    table_row,
    tile_of_lists,
    tile_of_ranks,
)
from spdsl.runtime.tuning.warps import without_repeats

LSE_COLUMNS = 16  # of the keys, in place of values, where a softmax is computed for its log-sum-exp alone


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel of a softmax or a choice; `lanes` are the queries of a tile of units, 0 for other kernels.

    `config` has the stages of the tables, and blocks and rows as they are launched.
    """

    kernel: KernelShape
    config: Config
    of: str
    span: Span | None
    lanes: int = 0


def launches(view: View) -> Iterator[Launch]:
    for one in _tiles(view):
        yield replace(one, config=without_repeats(one.kernel, one.config, view.architecture))


def _tiles(view: View) -> Iterator[Launch]:
    for softmax in view.plan.softmaxes:
        yield from unit_launches(view, softmax) if softmax.units else _swept(view, softmax)
    for choice in view.plan.choices:
        yield from _select(view, choice)


def steps_of(view: View, part: SoftmaxPlan | ChoicePlan) -> list[tuple[Stage, Step[object]]]:
    """The launches for a softmax or a choice whose tiles are of a table, with the stages that start them."""
    every = ((found.stage, step) for found in _schedules(view.plan) for step in found.steps)
    return [(stage, step) for stage, step in every if step.kernel and step.table and step.of == part]


@lru_cache(maxsize=16)
def _schedules(plan: Plan) -> tuple[Schedule, ...]:
    return tuple(schedule(plan, stage) for stage in stages(plan))


def dims(view: View, stream: Stream) -> tuple[int, int]:
    """Head dims of keys and values; entries have those of their source."""
    if stream.compress is not None:
        source = view.plan.pattern.input(stream.compress.source)
        assert isinstance(source, Stream)
        stream = source
    qk = stream.qk or view.shape.qk
    return qk, stream.v or (qk if stream.value is Values.KEY else view.shape.v)


def heads_per_list(view: View, choice: Choice, softmax: Softmax) -> int:
    """Query heads that share a list of units."""
    heads = view.query_heads(softmax) or view.shape.heads
    lists = heads if choice.share == "head" else view.plan.pattern.kv_heads or view.shape.kv_heads
    return max(1, heads // lists)


def unit_config(view: View, kernel: str, softmax: SoftmaxPlan, unit: int, page: int = 0) -> UnitShape:
    """The tiles of a kernel over units."""
    assert softmax.units is not None
    dim = table_dim(kernel, *dims(view, softmax.sweeps[0].stream))
    row = f"{kernel}_pairs" if softmax.pairs and kernel != "units_decode" else table_row(kernel, unit)
    found = lookup(row, view.architecture, dim, view.shape.size, UNIT_TABLES)
    config, group = _in_page(found, page_of_block(page, unit)), heads_per_list(view, softmax.units, softmax.softmax)
    shape = rows_alone(config, unit) if softmax.pairs else fitted(config, group, unit)
    return one_query(shape) if kernel == "units_decode" else shape


def unit_launches(view: View, softmax: SoftmaxPlan) -> Iterator[Launch]:
    """The kernels of a softmax over the units of a choice."""
    assert softmax.units is not None
    qk, v = dims(view, softmax.sweeps[0].stream)
    for kernel, page, _ in _kernels(view, softmax):
        unit = softmax.units.whole_unit if kernel == "units_dkdv" else softmax.units.unit
        shape = unit_config(view, kernel, softmax, unit, page)
        form = KernelShape(kernel, qk, v, view.shape.size, shape.group, paged=page > 0)
        yield Launch(form, shape.config, softmax.name, softmax.softmax.span, shape.lanes)


def _swept(view: View, softmax: SoftmaxPlan) -> Iterator[Launch]:
    """The kernels of a softmax over ranges or lists of blocks."""
    qk, v = dims(view, softmax.sweeps[0].stream)
    v = LSE_COLUMNS if softmax.role is Role.LSE else v
    bias = softmax.softmax.bias is not None
    heads = view.query_heads(softmax.softmax) or view.shape.heads
    group = min(heads // (view.kv_heads(sweep.stream) or view.shape.kv_heads) for sweep in softmax.sweeps) or 1
    for kernel, page, own in _kernels(view, softmax):
        decode, listed = kernel == "decode", bool(own.maps)
        row = kernel if decode else row_of_table(kernel, bias, softmax.by_pair)
        found = lookup(row, view.architecture, table_dim(kernel, qk, v), view.shape.size, TABLES)
        config = _in_page(found, page)
        config = config._replace(block_m=max(16, power_of_2(group))) if decode else config
        form = KernelShape(
            kernel, qk, v, view.shape.size, group if decode else 1, bias, page > 0, listed and not decode,
            _mask_bytes(own), bool(_mask_reads(own)),
        )  # fmt: skip
        yield Launch(form, config, softmax.name, softmax.softmax.span)


def _in_page(config: Config, page: int) -> Config:
    """A block of keys lies in one page. What loads in a chain add to the stages, the model of the footprint knows."""
    return config._replace(block_n=chained(config, page).block_n)


def _mask_reads(softmax: SoftmaxPlan) -> list[Tensor | Choice]:
    """What the element tests read; what only the bias reads is no mask."""
    names = {lookup_name(read) for sweep in softmax.sweeps for read in lookups(sweep.test)}
    return [source for source in softmax.reads if source.name in names]


def _mask_bytes(softmax: SoftmaxPlan) -> int:
    """Bytes that the mask reads for each key; int tensors are int64 as torch makes them, single bytes do not count."""
    tensors = [one for one in _mask_reads(softmax) if isinstance(one, Tensor) and one.by_token]
    return sum({"int": 8, "float": 4}.get(tensor.dtype, 0) for tensor in tensors)


def _kernels(view: View, softmax: SoftmaxPlan) -> list[tuple[str, int, SoftmaxPlan]]:
    """The tables of the kernels that are launched, each with the page of its keys and what it walks: one class, or
    all keys.
    """
    own_page = 0 if softmax.sweeps[0].stream.compress is not None else view.expected.page or 0  # entries lie in none
    found = (
        (step.table, 0 if stage.phase is Phase.TRAIN else own_page, _walked(softmax, step.kernel))
        for stage, step in steps_of(view, softmax)
    )
    return list(dict.fromkeys(found))


def _walked(softmax: SoftmaxPlan, kernel: str) -> SoftmaxPlan:
    of_class = softmax.of_class
    return of_class if of_class is not None and kernel.startswith(f"{of_class.name}_") else softmax


def _select(view: View, plan: ChoicePlan) -> Iterator[Launch]:
    """The kernel that scores the units of a choice, where some call starts it."""
    if not steps_of(view, plan):
        return
    choice = plan.choice
    assert choice.score is not None
    stream = view.plan.pattern.input(choice.score.grain.stream)
    assert isinstance(stream, Stream)
    qk, _ = dims(view, stream)
    found = lookup("select", view.architecture, max(qk, LSE_COLUMNS), view.shape.size, UNIT_TABLES)
    shape = fitted(found, heads_per_list(view, choice, choice.score.softmax), MOST_UNIT)
    if ranked(choice):
        shape = tile_of_ranks(shape, choice.capacity or MOST_RANKED)
    elif choice.rows > 1:
        shape = tile_of_lists(shape, choice.rows)
    form = KernelShape("select", qk, LSE_COLUMNS, view.shape.size, shape.group)
    yield Launch(form, shape.config, choice.name, choice.span, shape.lanes)
