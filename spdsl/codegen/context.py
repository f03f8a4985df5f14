"""context: what the templates print, every expression as text and every decision made."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass

import sympy

from spdsl.codegen.expressions import PYTHON, TORCH, TRITON, Dialect, expression
from spdsl.codegen.reads import Reads, extremes
from spdsl.ir.pattern import Branch, Case, Choice, Gate, Pattern, Phase, Query, Softmax, Stream, Tensor
from spdsl.ir.symbols import LENGTH
from spdsl.ir.plan import Form, Plan, Range, SoftmaxPlan, Sweep


@dataclass(frozen=True, slots=True)
class RangeText:
    """A range in one dialect; the condition is empty where it always holds."""

    first: str
    end: str
    condition: str
    full_first: str
    full_end: str
    full: str  # "True": whenever visited, "False": never, else a condition


@dataclass(frozen=True, slots=True)
class SweepText:
    name: str  # prefix of its functions
    stream: Stream
    ranges: bool  # else lists
    line: int
    visible: str
    mask: str
    keys: tuple[RangeText, ...]
    rows: tuple[RangeText, ...]
    visits: tuple[RangeText, ...]
    decode: tuple[RangeText, ...]
    decode_visits: tuple[RangeText, ...]
    may: str
    must: str
    extremes: tuple[tuple[str, str], ...]
    by_head: bool  # the visited tiles depend on the head


@dataclass(frozen=True, slots=True)
class SoftmaxText:
    name: str
    query: str
    sweeps: tuple[SweepText, ...]
    reads: tuple[Tensor | Choice, ...]
    scale: str
    softcap: float
    sink: str | None
    bias: str
    bias_mask: str
    bias_reads: tuple[str, ...]  # float tensors that the bias reads: no gradient reaches them
    skip_empty: bool  # decode tests a block's mask before it loads the block
    step: int
    of_class: SoftmaxText | None
    is_class: bool  # over one residue class: for `attention` only

    @property
    def lists(self) -> bool:
        return any(not sweep.ranges for sweep in self.sweeps)

    @property
    def keys(self) -> tuple[str, ...]:
        """The K and V arguments of its streams."""
        arguments = [(sweep.stream.key_argument, sweep.stream.value_argument) for sweep in self.sweeps]
        return tuple(name for pair in arguments for name in pair if name)

    @property
    def read_arguments(self) -> tuple[str, ...]:
        """The tensors that it reads; a choice comes as its map and the row tile that the map starts with."""
        return tuple(
            name for read in self.reads for name in ((read.name, f"{read.name}_first") if isinstance(read, Choice) else (read.name,))
        )

    @property
    def tensors(self) -> tuple[str, ...]:
        """All tensor arguments of its operator, in order."""
        return ("q", *self.keys, *((self.sink,) if self.sink else ()), *self.read_arguments)


@dataclass(frozen=True, slots=True)
class CaseText:
    condition: str  # over `length` and scalars; empty: always
    uses_length: bool
    calls: tuple[SoftmaxText, ...]  # softmaxes in the order of their use
    result: str  # expression over the names of the softmaxes
    extras: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModuleText:
    pattern: Pattern
    softmaxes: tuple[SoftmaxText, ...]
    queries: tuple[Query, ...]
    streams: tuple[Stream, ...]
    tensors: tuple[Tensor, ...]
    choices: tuple[Choice, ...]
    gated: int  # branches of the gate, 0: no gate
    phases: dict[str, tuple[CaseText, ...]]

    @property
    def vectors(self) -> tuple[str, ...]:
        """The arguments with a head dim: queries, keys and values, in the order of the pattern."""
        names: list[str] = []
        for found in self.pattern.inputs:
            if isinstance(found, Query):
                names.append(found.name)
            elif isinstance(found, Stream):
                names += [name for name in (found.key_argument, found.value_argument) if name]
        return tuple(names)

    @property
    def lookups(self) -> tuple[str, ...]:
        """The other tensor arguments: tensors, then given lists."""
        return (*(x.name for x in self.tensors), *(x.name for x in self.choices if x.rule == "given"))

    @property
    def prepared(self) -> tuple[str, ...]:
        """What the operators take: as above, with every choice as a map and its first row tile."""
        maps = tuple(name for x in self.choices for name in (x.name, f"{x.name}_first"))
        return (*self.vectors, *(x.name for x in self.tensors), *maps)

    @property
    def sinks(self) -> frozenset[str]:
        return frozenset(s.sink for s in self.softmaxes if s.sink)

    @property
    def no_gradient(self) -> frozenset[str]:
        return frozenset(name for s in self.softmaxes for name in s.bias_reads)

    @property
    def cached(self) -> bool:
        return "prefill" in self.phases or "decode" in self.phases

    @property
    def signature(self) -> str:
        return ", ".join((*self.vectors, *self.lookups, *(("gates",) if self.gated else ())))

    @property
    def argument_lines(self) -> str:
        """The shapes of the arguments, for a docstring."""
        lines = [f"{x.name} [B, {x.heads or self.pattern.query_heads or 'Hq'}, N, {x.dim or self.pattern.qk_dim or 'Dqk'}]" for x in self.queries]
        for x in self.streams:
            heads, qk = x.heads or self.pattern.kv_heads or "Hkv", x.qk or self.pattern.qk_dim or "Dqk"
            lines.append(f"{x.key_argument} [B, {heads}, M, {qk}]")
            if x.value_argument:
                lines.append(f"{x.value_argument} [B, {heads}, M, {x.v or self.pattern.v_dim or 'Dv'}]")
        lines += [f"{x.name} {x.dtype} [{', '.join(['B', *map(str, x.axes)])}]" for x in self.tensors]
        lines += [
            f"{x.name} int [B, {'Hq' if x.share == 'head' else 'Hkv'}, tiles of {x.rows} rows, most]: units of {x.unit} keys, -1 padded"
            for x in self.choices if x.rule == "given"
        ]  # fmt: skip
        lines += [f"gates [B, Hq, N, {self.gated}]"] if self.gated else []
        text = textwrap.fill("; ".join(lines) + ". -> out [B, Hq, N, Dv] in the dtype of q.", 110)
        return textwrap.indent(text, "    ")


def context(plan: Plan) -> ModuleText:
    """The texts of a plan."""
    pattern = plan.pattern
    whole = tuple(_softmax(found) for found in plan.softmaxes)
    by_name = {found.name: found for found in whole}
    softmaxes = tuple(one for found in whole for one in (found, found.of_class) if one)
    phases = {
        phase.value: tuple(_case(case, by_name) for case in pattern.cases_of(phase))
        for phase in Phase
        if pattern.cases_of(phase)
    }
    gates = [branch for case in pattern.cases for branch in (case.branch, *case.extras) if isinstance(branch, Gate)]
    return ModuleText(
        pattern, softmaxes,
        tuple(found for found in pattern.inputs if isinstance(found, Query)),
        tuple(found for found in pattern.inputs if isinstance(found, Stream)),
        tuple(found for found in pattern.inputs if isinstance(found, Tensor)),
        tuple(found for found in pattern.inputs if isinstance(found, Choice)),
        len(gates[0].branches) if gates else 0, phases,
    )  # fmt: skip


def _softmax(plan: SoftmaxPlan, is_class: bool = False) -> SoftmaxText:
    softmax = plan.softmax
    reads = Reads({source.name: source for source in plan.reads})
    several = len(plan.sweeps) > 1
    sweeps = tuple(
        _sweep(sweep, f"{plan.name}_{sweep.stream.name}" if several else plan.name, reads) for sweep in plan.sweeps
    )
    bias = softmax.bias
    scale = expression(softmax.scale, PYTHON) if softmax.scale is not None else ""
    bias_reads = tuple(
        source.name for source in plan.reads
        if bias is not None and isinstance(source, Tensor) and source.dtype == "float" and _mentions(bias, source.name)
    )  # fmt: skip
    return SoftmaxText(
        plan.name, softmax.query, sweeps, plan.reads, scale, softmax.softcap or 0.0, softmax.sink,
        expression(bias, TRITON, reads.triton) if bias is not None else "",
        expression(bias, TORCH, reads.torch) if bias is not None else "",
        bias_reads, skip_empty=any(sweep.form is Form.LISTS for sweep in plan.sweeps), step=plan.step,
        of_class=_softmax(plan.of_class, True) if plan.of_class else None, is_class=is_class,
    )  # fmt: skip


def _mentions(value: sympy.Basic, name: str) -> bool:
    return any(read.func.__name__ == name for read in value.atoms(sympy.core.function.AppliedUndef))


def _sweep(sweep: Sweep, name: str, reads: Reads) -> SweepText:
    def triton(value: sympy.Basic) -> str:
        return expression(value, TRITON, reads.triton)

    def torch(value: sympy.Basic) -> str:
        return expression(value, TORCH, reads.torch)

    def ranges(found: tuple[Range, ...], dialect: Dialect, text: Callable[[sympy.Basic], str]) -> tuple[RangeText, ...]:
        return tuple(_range(one, text) for one in found)

    return SweepText(
        name, sweep.stream, sweep.form is Form.RANGES, sweep.line, triton(sweep.test), torch(sweep.test),
        ranges(sweep.keys, TRITON, triton), ranges(sweep.rows, TRITON, triton),
        tuple(_range(one, _python) for one in _any_head(sweep.keys)),
        ranges(sweep.decode, TRITON, triton), tuple(_range(one, _python) for one in sweep.decode),
        torch(sweep.may), torch(sweep.must), tuple(extremes(sweep.may, sweep.must, reads.sources, torch)),
        by_head=any(symbol.name == "h" for symbol in sweep.test.free_symbols),
    )  # fmt: skip


def _python(value: sympy.Basic) -> str:
    return expression(value, PYTHON)


def _range(found: Range, text: Callable[[sympy.Basic], str]) -> RangeText:
    condition = "" if found.condition is sympy.true else text(found.condition)
    full = "True" if found.full == found.condition else "False" if found.full is sympy.false else text(found.full)
    return RangeText(
        text(found.first), text(found.end), condition, text(found.full_first), text(found.full_end), full
    )


def _any_head(ranges: tuple[Range, ...]) -> tuple[Range, ...]:
    """The ranges of all heads together: conditions on the head hold for some head, full tiles for none."""
    return tuple(
        Range(one.first, one.end, _without_reads(one.condition), one.full_first, one.full_end,
              one.full if one.full == _without_reads(one.full) else sympy.false)
        for one in ranges
    )  # fmt: skip


def _without_reads(condition: sympy.Basic) -> sympy.Basic:
    """The part of a conjunction that knows neither head nor tensors."""
    parts = condition.args if isinstance(condition, sympy.And) else (condition,)
    positions_only = [
        part for part in parts
        if not part.atoms(sympy.core.function.AppliedUndef) and "h" not in {symbol.name for symbol in part.free_symbols}
    ]  # fmt: skip
    return sympy.And(*positions_only)


def _case(case: Case, softmaxes: dict[str, SoftmaxText]) -> CaseText:
    used: dict[str, SoftmaxText] = {}
    result = _branch(case.branch, softmaxes, used)
    extras = tuple(_branch(extra, softmaxes, used) for extra in case.extras)
    condition = "" if case.condition is None else expression(case.condition, TORCH, scalar_read)
    uses_length = case.condition is not None and LENGTH in case.condition.free_symbols
    return CaseText(condition, uses_length, tuple(used.values()), result, extras)


def scalar_read(read: sympy.Basic, text: Callable[[sympy.Basic], str]) -> str:
    return str(read.func.__name__)


def _branch(branch: Branch, softmaxes: dict[str, SoftmaxText], used: dict[str, SoftmaxText]) -> str:
    if isinstance(branch, Softmax):
        used.setdefault(branch.name, softmaxes[branch.name])
        return f"{branch.name}_part"
    parts = ", ".join(_branch(inner, softmaxes, used) for inner in branch.branches)
    return f"gate([{parts}], gates)" if isinstance(branch, Gate) else f"merge([{parts}])"

