"""module_text: what the templates print of a whole module: its inputs, its results, and what is made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from spdsl.codegen.answer_text import CaseText, ExtraText, MeaningText, read_by
from spdsl.codegen.choice_text import ChoiceText
from spdsl.codegen.entries_text import EntriesText
from spdsl.codegen.softmax_text import JointText, SoftmaxText
from spdsl.codegen.spelling import Spelling
from spdsl.ir.pattern import Branch, Choice, Extra, Gate, Kept, Pattern, Phase, Query, Stream, Tensor, Weight
from spdsl.ir.rule import TopK
from spdsl.passes.joint import leaves

_END = 120  # columns of a line


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
    lists: tuple[Choice, ...]  # given for single queries
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
        """What `attention` and `choices` call as a whole; parts of a joint are not called by themselves."""
        calls = [call for case in self.phases.get("train", ()) for call in case.answer.calls]
        called = {call.name for call in calls} | {step.name for meaning in self.choosing for step in meaning.steps}
        called |= {s.of_class.name for s in self.softmaxes if s.of_class and s.name in called}
        wholes: tuple[SoftmaxText | JointText, ...] = (*self.softmaxes, *self.joints)
        return tuple(whole for whole in wholes if whole.name in called)

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
        given = (x.name for x in (*self.choices, *self.lists) if x.given)
        return (*(x.name for x in self.tensors), *given)

    def read(self, phase: str) -> tuple[str, ...]:
        """The other tensor arguments that a phase asks for."""
        read = self._reads(phase)
        return tuple(name for name in self.lookups if name in read)

    def gates(self, phase: str) -> int:
        """Branches of the gate of a phase, 0: none."""
        return self.gated if any(case.gated for case in self.phases[phase]) else 0

    @property
    def gated_phases(self) -> tuple[str, ...]:
        """The phases with gates."""
        return tuple(phase for phase in self.phases if self.gates(phase))

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
        return frozenset(x.name for x in self.tensors if x.by_token and x.name in read)

    @property
    def kept_by_head(self) -> tuple[str, ...]:
        """Those of them with numbers for each query head."""
        return tuple(x.name for x in self.tensors if x.name in self.kept_tokens and "head" in x.axes)

    @property
    def paged_phases(self) -> tuple[str, ...]:
        """The phases that answer over adopted pages; where both answer alike, one of them does."""
        cached = tuple(phase for phase in ("prefill", "decode") if phase in self.phases)
        same = len(cached) == 2 and self.phases["prefill"] == self.phases["decode"]
        return cached[:1] if same else cached

    def read_in(self, phases: Sequence[str]) -> tuple[str, ...]:
        """The other tensor arguments that each of the phases asks for."""
        return tuple(name for name in self.lookups if all(name in self.read(phase) for phase in phases))

    def unread_in(self, phases: Sequence[str]) -> tuple[str, ...]:
        """The arguments that one of the phases may leave out."""
        names = (name for phase in phases for name in self.unread(phase))
        return tuple(dict.fromkeys(names))

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
        """What is made of the others: a choice is a map and its first row tile, or lists."""
        maps = tuple(name for x in self.choices for name in (x.name, f"{x.name}_first"))
        return (*(x.name for x in self.tensors), *maps, *(x.name for x in self.lists))

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

    def results(self, phase: str) -> Iterator[tuple[str, int, int, int]]:
        """Of each result of a phase with a cache: the state of its values, their dim if that is not all of it, the
        branches of a gate; and of counts of tiles the rows of a tile."""
        cases = self.pattern.cases_of(Phase(phase))
        results: list[list[Extra]] = [[case.branch for case in cases], *([extra] for extra in cases[0].extras)]
        for found in results:
            if isinstance(found[0], Kept):
                skip = found[0].softmax.skip
                yield "", 0, 0, 0 if skip is None else skip.rows
            branches = [one for one in found if isinstance(one, Branch)]
            if not branches:
                continue
            leaf = next(iter(leaves(branches[0])))
            stream = next(s for s in self.softmaxes if s.name == leaf).sweeps[0].stream
            gates = max((len(branch.branches) for branch in branches if isinstance(branch, Gate)), default=0)
            if stream.value_argument:
                yield f"v.{stream.name}", 0, gates, 0
            else:
                yield f"k.{stream.name}", stream.v or self.pattern.v_dim or 0, gates, 0

    @property
    def sums(self) -> tuple[tuple[str, tuple[tuple[str, ...], ...]], ...]:
        """The same by phase."""
        return tuple((phase, self.summed(phase)) for phase in self.phases if self.summed(phase))

    @property
    def sinks(self) -> frozenset[str]:
        return frozenset(s.sink for s in self.softmaxes if s.sink)

    @property
    def learns(self) -> dict[str, bool]:
        """What biases read in results that have a gradient: whether each of them gives it one."""
        own = [s for s in self.softmaxes if s.learns or not s.is_branch]
        return {
            x.name: all(x.name in s.bias_learned for s in own if x.name in s.bias_floats)
            for x in self.tensors
            if any(x.name in s.bias_floats for s in own)
        }

    @property
    def counts(self) -> dict[str, int]:
        """The tensors that say how long lists are, and how long they can be."""
        found = (
            (x.name, c.choice.capacity)
            for c in self.selected
            for x in c.plan.at_call
            if isinstance(c.choice.rule, TopK)
        )
        return {name: most for name, most in found if most}

    @property
    def widened(self) -> bool:
        """Whether the reference computes with more than queries, keys and values in floating point."""
        return bool(self.entries or self.extras or any(x.dtype == "float" for x in self.tensors))

    @property
    def scaled(self) -> bool:
        """Whether a product leaves its scale to the call."""
        return any(not s.scale for s in self.softmaxes)

    @property
    def scales_written(self) -> bool:
        """Whether another writes it."""
        return any(s.scale for s in self.softmaxes)

    @property
    def cached(self) -> bool:
        return "prefill" in self.phases or "decode" in self.phases

    def signature(self, phase: str) -> str:
        gates = ("gates",) if self.gates(phase) else ()
        return ", ".join((*self.vectors, *(x.name for x in self.weights), *self.read(phase), *gates))

    def filled(self, parameters: str, column: int = 4) -> str:
        """Parameters, parted by ", ", on as few lines as they fit on once their names are written."""
        lines, end = list[str](), _END
        for one in parameters.split(", "):
            width = len(self.spelling.written(one)) + 2
            if end + width > _END:
                lines, end = [*lines, " " * (column - 1)], column - 1
            lines[-1], end = f"{lines[-1]} {one},", end + width
        no_comma = parameters.rpartition(", ")[2].startswith("**")
        return "\n".join(lines).removesuffix("," if no_comma else "")


def _shared(name: str, answers: Mapping[str, object]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """A name, and the phases that answer alike: one function for all of them, or one for each answer."""
    phases: dict[object, list[str]] = {}
    for phase, answer in answers.items():
        phases.setdefault(answer, []).append(phase)
    for group in phases.values():
        yield name if len(phases) == 1 else f"{name}_{group[0]}", tuple(group)
