"""module_text: what the templates print of a whole module: its inputs, its results, and what is made of them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from spdsl.codegen.spelling import Spelling
from spdsl.codegen.texts import ChoiceText, JointText, SoftmaxText, cells_of
from spdsl.ir.pattern import Branch, Choice, Pattern, Phase, Query, Stream, Tensor, Weight
from spdsl.ir.pool import Pool
from spdsl.passes.joint import leaves
from spdsl.primitives.pools import POOLS


@dataclass(frozen=True, slots=True)
class EntriesText:
    """A compressed stream: where its keys and values come from."""

    stream: Stream
    source: Stream
    logits: Stream | None
    weights: tuple[tuple[str, ...], ...]  # of keys, of values
    has_values: bool  # some result reads them
    kept: bool  # by a cache

    @property
    def name(self) -> str:
        return self.stream.name

    @property
    def pool(self) -> Pool:
        assert self.stream.compress is not None
        return POOLS[self.stream.compress.by]

    @property
    def cells(self) -> str:
        return cells_of(self.stream.grid)

    @property
    def sides(self) -> tuple[tuple[str, str, str, str, tuple[str, ...]], ...]:
        """(k or v, argument, argument of the source, of the logits, weights) of what is computed."""
        return tuple(self._side(side) for side in "kv"[: 1 + self.has_values])

    def _side(self, side: str) -> tuple[str, str, str, str, tuple[str, ...]]:
        logits = ""
        if self.logits is not None:
            logits = (self.logits.value_argument if side == "v" else None) or self.logits.key_argument
        made = (self.stream.key_argument, self.source.key_argument)
        if side == "v":
            made = (self.stream.value_argument or "", self.source.value_argument or "")
        return side, *made, logits, self.weights[side == "v"]


@dataclass(frozen=True, slots=True)
class PooledText:
    """A score at the grains of a result; `prefix` names it among the parts of the result."""

    prefix: str
    softmax: SoftmaxText
    probability: bool
    unit: int
    rows: int
    share: str
    heads_by: str | None
    rows_by: str | None
    unit_by: str | None

    @property
    def needs_lse(self) -> bool:
        """From outside: that of a softmax which is no branch has no gradient, the score computes it again."""
        return self.probability and self.softmax.is_branch

    @property
    def key_argument(self) -> str:
        return self.softmax.sweeps[0].stream.key_argument


@dataclass(frozen=True, slots=True)
class ExtraText:
    """A further result that is a score, or the divergence of two: target and score."""

    name: str
    parts: tuple[PooledText, ...]
    listed: Choice | None = None  # whose units hold every entry of a divergence
    walked: bool = False  # by kernels

    @property
    def call(self) -> str:
        return f"_{self.name}({self._given})"

    @property
    def dense_call(self) -> str:
        """That of the reference."""
        return f"_{self.name}_torch({self._given})" if self.walked else self.call

    @property
    def _given(self) -> str:
        lses = "".join(f", {part.softmax.name}_part[1]" for part in self.parts if part.needs_lse)
        return f"inputs, layout{lses}"


@dataclass(frozen=True, slots=True)
class AnswerText:
    """How one kind of call answers: what it computes, in the order of its use, and expressions over their names."""

    calls: tuple[SoftmaxText | JointText | ChoiceText, ...]
    result: str
    extras: tuple[str | ExtraText, ...]


@dataclass(frozen=True, slots=True)
class CaseText:
    condition: str  # over `length` and scalars; empty: always
    uses_length: bool
    scalars: tuple[str, ...]  # of the condition
    gated: bool
    dense: AnswerText  # of `reference`
    answer: AnswerText  # of `attention`: joints in place of their parts; with a cache parts of one query are splits

    @property
    def reads(self) -> frozenset[str]:
        """The tensors and choices that its results are made of."""
        extras = [part.softmax for x in self.dense.extras if isinstance(x, ExtraText) for part in x.parts]
        return frozenset(self.scalars) | read_by(*self.dense.calls, *extras)

    @property
    def without_scores(self) -> CaseText:
        """As the phases with a cache answer."""
        branches = tuple(extra for extra in self.dense.extras if isinstance(extra, str))
        return replace(self, dense=replace(self.dense, extras=branches))


def read_by(*steps: SoftmaxText | JointText | ChoiceText) -> frozenset[str]:
    """The tensors and choices that the steps read."""
    softmaxes = [step.softmax if isinstance(step, ChoiceText) else step for step in steps]
    chosen = [x.name for step in steps if isinstance(step, ChoiceText) for x in step.plan.reads]
    return frozenset((*(name for step in softmaxes for name in step.tensors), *chosen))


@dataclass(frozen=True, slots=True)
class MeaningText:
    """What `reference` or `choices` computes in phases that mean the same."""

    name: str
    phases: tuple[str, ...]
    cases: tuple[CaseText, ...] = ()  # of the reference
    steps: tuple[SoftmaxText | ChoiceText, ...] = ()  # of the choices
    needs: tuple[str, ...] = ()  # arguments that the signature lets one leave out, and these phases read


@dataclass(frozen=True, slots=True)
class ModuleText:
    spelling: Spelling  # of all names in it
    pattern: Pattern
    softmaxes: tuple[SoftmaxText, ...]
    joints: tuple[JointText, ...]
    queries: tuple[Query, ...]
    streams: tuple[Stream, ...]  # of the caller
    entries: tuple[EntriesText, ...]  # computed from them
    weights: tuple[Weight, ...]
    tensors: tuple[Tensor, ...]
    choices: tuple[Choice, ...]  # given and drawn: read as maps
    selected: tuple[ChoiceText, ...]
    gated: int  # branches of the gate, 0: no gate
    phases: dict[str, tuple[CaseText, ...]]
    resident: tuple[int, int] | None  # first tokens and window, where later queries read no others

    @property
    def extras(self) -> tuple[ExtraText, ...]:
        """Scores that `attention` returns."""
        cases = self.phases.get("train", ())
        return tuple(extra for case in cases for extra in case.answer.extras if isinstance(extra, ExtraText))

    @property
    def operators(self) -> tuple[SoftmaxText | JointText, ...]:
        """What is differentiable as a whole; parts of a joint are not by themselves."""
        inside = {part.name for joint in self.joints for part in joint.parts}
        return (*(found for found in self.softmaxes if found.is_computed and found.name not in inside), *self.joints)

    @property
    def walked(self) -> tuple[ExtraText, ...]:
        """Those that kernels compute."""
        return tuple(extra for extra in self.extras if extra.walked)

    @property
    def first_phase(self) -> str:
        """Whose arguments `reference` and `choices` have."""
        return next(iter(self.phases))

    @property
    def meanings(self) -> tuple[MeaningText, ...]:
        """What `reference` computes."""
        meant = {
            phase: cases if phase == "train" else tuple(case.without_scores for case in cases)
            for phase, cases in self.phases.items()
        }
        answers = {phase: tuple((case.condition, case.dense) for case in cases) for phase, cases in meant.items()}
        return tuple(
            MeaningText(name, phases, meant[phases[0]], needs=self._needs(*(case.reads for case in meant[phases[0]])))
            for name, phases in _shared("_reference", answers)
        )

    @property
    def choosing(self) -> tuple[MeaningText, ...]:
        """What `choices` computes; in a phase without choices it does not."""
        steps = {phase: self._choosing(phase) for phase in self.phases if self._choosing(phase)}
        return tuple(
            MeaningText(name, phases, steps=steps[phases[0]], needs=self._needs(read_by(*steps[phases[0]])))
            for name, phases in _shared("_choices", steps)
        )

    def _choosing(self, phase: str) -> tuple[SoftmaxText | ChoiceText, ...]:
        """What all choices of a phase take, each step after what it reads."""
        calls = [
            call
            for case in self.phases[phase]
            for call in case.dense.calls
            if isinstance(call, SoftmaxText | ChoiceText)
        ]
        chosen = [call for call in calls if isinstance(call, ChoiceText)]
        needed = {found.softmax.name for found in chosen if found.probability}
        steps = [call for call in calls if isinstance(call, ChoiceText) or call.name in needed]
        return tuple({step.name: step for step in steps}.values())

    def _needs(self, *reads: frozenset[str]) -> tuple[str, ...]:
        """Of the tensors that are read, those that may be left out of the first phase."""
        read = frozenset().union(*reads)
        return tuple(name for name in self.unread(self.first_phase) if name in read)

    @property
    def kept(self) -> tuple[EntriesText, ...]:
        """Those that a cache keeps."""
        return tuple(found for found in self.entries if found.kept)

    @property
    def pairs(self) -> bool:
        """Whether a softmax has its keys outermost."""
        return any(found.pairs for found in self.softmaxes)

    @property
    def streamed(self) -> bool:
        """Whether kernels make entries: torch makes those of a network."""
        return any(found.pool.backward for found in self.entries)

    @property
    def vectors(self) -> tuple[str, ...]:
        """The arguments with a head dim: queries, keys and values, in the order of the pattern."""
        names: list[str] = []
        for found in self.pattern.inputs:
            if isinstance(found, Query):
                names.append(found.name)
            elif isinstance(found, Stream) and found.compress is None:
                names += [name for name in (found.key_argument, found.value_argument) if name]
        return tuple(names)

    def asking(self, stream: Stream) -> str:
        """The query that asks the keys of a stream, or of the entries made of it."""
        own = {stream.name, *(found.name for found in self.entries if found.source.name == stream.name)}
        asking = (s.query for s in self.softmaxes for sweep in s.sweeps if sweep.stream.name in own)
        return next(asking, self.queries[0].name)

    @property
    def lookups(self) -> tuple[str, ...]:
        """The other tensor arguments: tensors, then given lists."""
        return (*(x.name for x in self.tensors), *(x.name for x in self.choices if x.given))

    def read(self, phase: str) -> tuple[str, ...]:
        """The other tensor arguments that a phase asks for."""
        read = self._reads(phase)
        return tuple(name for name in self.lookups if name in read)

    def gates(self, phase: str) -> int:
        """Branches of the gate of a phase, 0: none."""
        return self.gated if any(case.gated for case in self.phases[phase]) else 0

    def unread(self, phase: str) -> tuple[str, ...]:
        """The arguments that no result of the phase reads: they may be left out."""
        read = self._reads(phase)
        names = [name for name in self.lookups if name not in read]
        return (*names, *(("gates",) if self.gated and not self.gates(phase) else ()))

    @property
    def optional(self) -> frozenset[str]:
        """Those that some phase does not read."""
        return frozenset(name for phase in self.phases for name in self.unread(phase))

    def _reads(self, phase: str) -> frozenset[str]:
        """What the results of a phase read, and what it appends to the cache."""
        cases = self.phases[phase]
        own = frozenset(name for case in cases for name in case.reads)
        return own if phase == "train" else own | self.kept_tokens

    @property
    def kept_tokens(self) -> frozenset[str]:
        """The tensors over tokens that a cache keeps: those of any phase that has one."""
        cases = (*self.phases.get("prefill", ()), *self.phases.get("decode", ()))
        read = {name for case in cases for name in case.reads}
        return frozenset(x.name for x in self.tensors if "token" in x.axes and x.name in read)

    @property
    def paged_phase(self) -> str:
        """The phase that answers over adopted pages; "": none, as it is not clear which."""
        cached = [phase for phase in ("prefill", "decode") if phase in self.phases]
        same = len(cached) == 1 or (len(cached) == 2 and self.phases["prefill"] == self.phases["decode"])
        return cached[0] if same else ""

    @property
    def required(self) -> tuple[str, ...]:
        """The arguments that every call has."""
        return (*self.vectors, *(x.name for x in self.weights))

    @property
    def paged_sources(self) -> tuple[str, ...]:
        """The arguments of which entries in adopted pages are made."""
        read = {x.name for e in self.kept for x in (e.source, e.logits) if x is not None}
        arguments = (name for x in self.streams if x.name in read for name in (x.key_argument, x.value_argument))
        return tuple(name for name in arguments if name)

    @property
    def stored(self) -> tuple[str, ...]:
        """The arguments that a cache keeps: keys and values, weights of its entries are those of the call."""
        arguments = (name for x in self.streams for name in (x.key_argument, x.value_argument))
        return tuple(name for name in arguments if name)

    @property
    def public(self) -> frozenset[str]:
        """The fields of `Inputs` that the library and the caller know by name; all but those are in `computed`."""
        pages = (f"{name}_pages" for name in self.stored)
        return frozenset((*self.required, *self.prepared, *(found.name for found in self.selected), *pages))

    @property
    def prepared(self) -> tuple[str, ...]:
        """What is made of the others: every choice is a map and its first row tile."""
        maps = tuple(name for x in self.choices for name in (x.name, f"{x.name}_first"))
        return (*(x.name for x in self.tensors), *maps)

    @property
    def computed(self) -> tuple[str, ...]:
        """What a call computes before its softmaxes: entries, and the choices that the caller did not pass."""
        entries = tuple(side[1] for found in self.entries for side in found.sides)
        return (*entries, *(found.name for found in self.selected))

    def summed(self, phase: str) -> tuple[tuple[str, ...], ...]:
        """The value arguments of what becomes one result: they have one dim."""
        cases = self.pattern.cases_of(Phase(phase))
        extras = [[extra] for case in cases for extra in case.extras if isinstance(extra, Branch)]
        groups = (self._values(branches) for branches in ([case.branch for case in cases], *extras))
        return tuple(dict.fromkeys(group for group in groups if len(group) > 1))

    def _values(self, branches: Sequence[Branch]) -> tuple[str, ...]:
        """Of entries, those that they are made of."""
        names = {leaf for branch in branches for leaf in leaves(branch)}
        read = {sweep.stream.name for s in self.softmaxes if s.name in names for sweep in s.sweeps}
        read |= {found.source.name for found in self.entries if found.name in read and found.has_values}
        return tuple(x.value_argument for x in self.streams if x.name in read and x.value_argument)

    @property
    def sums(self) -> tuple[tuple[str, tuple[tuple[str, ...], ...]], ...]:
        """The same by phase."""
        return tuple((phase, self.summed(phase)) for phase in self.phases if self.summed(phase))

    @property
    def sinks(self) -> frozenset[str]:
        return frozenset(s.sink for s in self.softmaxes if s.sink)

    @property
    def no_gradient(self) -> frozenset[str]:
        return frozenset(name for s in self.softmaxes for name in s.bias_reads)

    @property
    def widened(self) -> bool:
        """Whether the reference computes with more than queries, keys and values in floating point."""
        return bool(self.entries or self.extras or any(x.dtype == "float" for x in self.tensors))

    @property
    def cached(self) -> bool:
        return "prefill" in self.phases or "decode" in self.phases

    def signature(self, phase: str) -> str:
        gates = ("gates",) if self.gates(phase) else ()
        return ", ".join((*self.vectors, *(x.name for x in self.weights), *self.read(phase), *gates))

    @property
    def argument_lines(self) -> str:
        """The shapes of the arguments, for a docstring."""
        pattern = self.pattern
        q_heads, kv_heads = pattern.query_heads or "Hq", pattern.kv_heads or "Hkv"
        qk, v = pattern.qk_dim or "Dqk", pattern.v_dim or "Dv"
        lines = [f"{x.name} [B, {x.heads or q_heads}, N, {x.dim or qk}]" for x in self.queries]
        for x in self.streams:
            lines.append(f"{x.key_argument} [B, {x.heads or kv_heads}, M, {x.qk or qk}]")
            if x.value_argument:
                lines.append(f"{x.value_argument} [B, {x.heads or kv_heads}, M, {x.v or v}]")
        unread = self.unread("train") if "train" in self.phases else ()
        read = [x for x in self.tensors if x.name not in unread]
        lines += [f"{x.name} {x.dtype} [{', '.join(['B', *map(str, x.axes)])}]" for x in read]
        for given in (x for x in self.choices if x.name not in unread):
            heads = q_heads if given.share == "head" else kv_heads
            if given.given:
                units = f"units of {given.unit} keys, -1 padded"
                lines.append(f"{given.name} int [B, {heads}, tiles of {given.rows} rows, most]: {units}")
        lines += [f"{x.name} [{', '.join(map(str, x.axes))}]" for x in self.weights]
        lines += [f"gates [B, Hq, N, {self.gated}]"] if self.gated and "gates" not in unread else []
        for found in self.selected:
            heads = q_heads if found.choice.share == "head" else kv_heads
            units = f"units of {found.choice.unit} keys to use instead of the computed ones, -1 padded"
            lines.append(f"{found.name} int [B, {heads}, N, any]: {units}")
        lines += [f"{', '.join(unread)}: not read here, may be left out"] if unread else []
        text = self.spelling.written("; ".join(lines) + ". -> out [B, Hq, N, Dv] in the dtype of q.")
        text = textwrap.fill(text, 110)
        return textwrap.indent(text, "    ")


def _shared(name: str, answers: Mapping[str, object]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """A name, and the phases that answer alike: one function for all of them, or one for each answer."""
    phases: dict[object, list[str]] = {}
    for phase, answer in answers.items():
        phases.setdefault(answer, []).append(phase)
    for group in phases.values():
        yield name if len(phases) == 1 else f"{name}_{group[0]}", tuple(group)
