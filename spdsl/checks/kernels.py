"""The kernels that a plan launches, with the configuration that the tables give them: what launching does, read off.

Numbers that neither the pattern nor `expect` fixes are those of `View.shape`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from spdsl.checks.view import View
from spdsl.diagnostics import Span
from spdsl.ir.pattern import Choice, Phase, Softmax, Stream, Tensor, Values
from spdsl.ir.plan import ChoicePlan, Form, Role, SoftmaxPlan
from spdsl.ir.symbols import lookup_name, lookups
from spdsl.runtime.tuning.configs import TABLES, Config, chained, lookup, power_of_2, table_dim
from spdsl.runtime.tuning.footprint import KernelShape
from spdsl.runtime.tuning.unit_configs import (
    MOST_UNIT,
    UNIT_TABLES,
    UnitShape,
    fitted,
    one_query,
    rows_alone,
    tile_of_lists,
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
        if softmax.role is not Role.LOGITS:
            yield from unit_launches(view, softmax) if softmax.units else _swept(view, softmax)
    for choice in view.plan.choices:
        yield _select(view, choice)


def phases(view: View, name: str) -> frozenset[Phase]:
    """The phases that compute a softmax or a choice."""
    pattern = view.plan.pattern
    cases = (case for case in pattern.cases if any(step.name == name for step in pattern.steps(case)))
    return frozenset(phase for case in cases for phase in case.phases)


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
    row = f"{kernel}_pairs" if softmax.pairs and kernel != "units_decode" else kernel
    found = lookup(row, view.architecture, dim, view.shape.size, UNIT_TABLES)
    config, group = _in_page(found, page), heads_per_list(view, softmax.units, softmax.softmax)
    shape = rows_alone(config, unit) if softmax.pairs else fitted(config, group, unit)
    return one_query(shape) if kernel == "units_decode" else shape


def unit_launches(view: View, softmax: SoftmaxPlan) -> Iterator[Launch]:
    """The kernels of a softmax over the units of a choice."""
    assert softmax.units is not None
    qk, v = dims(view, softmax.sweeps[0].stream)
    for kernel, page in _kernels(view, softmax, ("units", "units_dq", "units_dkdv", "units_decode")):
        shape = unit_config(view, kernel, softmax, softmax.units.unit, page)
        form = KernelShape(kernel, qk, v, view.shape.size, shape.group, paged=page > 0)
        yield Launch(form, shape.config, softmax.name, softmax.softmax.span, shape.lanes)


def _swept(view: View, softmax: SoftmaxPlan) -> Iterator[Launch]:
    """The kernels of a softmax over ranges or lists of blocks."""
    qk, v = dims(view, softmax.sweeps[0].stream)
    v = LSE_COLUMNS if softmax.role is Role.LSE else v
    listed = any(sweep.form is Form.LISTS for sweep in softmax.sweeps)
    bias = softmax.softmax.bias is not None
    heads = view.query_heads(softmax.softmax) or view.shape.heads
    group = min(heads // (view.kv_heads(sweep.stream) or view.shape.kv_heads) for sweep in softmax.sweeps) or 1
    for kernel, page in _kernels(view, softmax, ("forward", "dq", "dkdv", "decode")):
        decode = kernel == "decode"
        row = kernel if decode or not bias else f"{kernel}_bias"
        found = lookup(row, view.architecture, table_dim(kernel, qk, v), view.shape.size, TABLES)
        config = _in_page(found, page)
        config = config._replace(block_m=max(16, power_of_2(group))) if decode else config
        form = KernelShape(
            kernel, qk, v, view.shape.size, group if decode else 1, bias, page > 0, listed and not decode,
            _mask_bytes(softmax), bool(_mask_reads(softmax)),
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
    tensors = [one for one in _mask_reads(softmax) if isinstance(one, Tensor) and "token" in one.axes]
    return sum({"int": 8, "float": 4}.get(tensor.dtype, 0) for tensor in tensors)


def _kernels(view: View, softmax: SoftmaxPlan, names: tuple[str, str, str, str]) -> Iterator[tuple[str, int]]:
    """Of forward, dq, dkdv and decode those that are launched, each with the page of its keys."""
    own = phases(view, softmax.name)
    page = 0 if softmax.sweeps[0].stream.compress is not None else view.expected.page or 0  # entries lie in none
    forward, dq, dkdv, decode = names
    if Phase.TRAIN in own or (Phase.PREFILL in own and not page):
        yield forward, 0
    if Phase.PREFILL in own and page:
        yield forward, page
    if Phase.TRAIN in own and softmax.role is Role.BRANCH:
        yield dq, 0
        yield dkdv, 0
    if Phase.DECODE in own:
        yield decode, page


def _select(view: View, plan: ChoicePlan) -> Launch:
    """The kernel that scores the units of a choice."""
    choice = plan.choice
    assert choice.score is not None
    stream = view.plan.pattern.input(choice.score.grain.stream)
    assert isinstance(stream, Stream)
    qk, _ = dims(view, stream)
    found = lookup("select", view.architecture, max(qk, LSE_COLUMNS), view.shape.size, UNIT_TABLES)
    shape = fitted(found, heads_per_list(view, choice, choice.score.softmax), MOST_UNIT)
    shape = shape if choice.rows == 1 else tile_of_lists(shape, choice.rows)
    form = KernelShape("select", qk, LSE_COLUMNS, view.shape.size, shape.group)
    return Launch(form, shape.config, choice.name, choice.span, shape.lanes)
