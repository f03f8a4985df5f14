"""What a pattern means: inputs, softmaxes over terms, branches, results.

Every pattern reduces to *branches -> softmax groups -> terms*. A term is the entries of one stream that pass one
element test; a set that is computed or given (`Choice`) appears in the test as a lookup into its membership map,
so that all sets are one kind of thing: a Boolean over `q`, `k`, `h`, `length` and lookups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from spdsl.diagnostics import Span
from spdsl.ir.branch import Branch, Gate, Kept, Merge, Softmax, Term, leaves
from spdsl.ir.choice import LEAST_BLOCK, Choice
from spdsl.ir.inputs import Compress, Grid, Query, Stream, Tensor, Values, Weight
from spdsl.ir.score import Grain, Kl, Logits, Mass, Pooled, Score
from spdsl.ir.symbols import Boolean, lookup_name, lookups

__all__ = [
    "ALL_PHASES", "LEAST_BLOCK", "Branch", "Case", "Choice", "Compress", "Expected", "Extra", "Gate", "Grain", "Grid",
    "Input", "Kept", "Kl", "Logits", "Mass", "Merge", "Pattern", "Phase", "Pooled", "Query", "Score", "Softmax",
    "Stream", "Tensor", "Term", "Values", "Weight", "leaves",
]  # fmt: skip

Input = Query | Stream | Tensor | Weight | Choice
Extra = Softmax | Gate | Merge | Pooled | Kl | Kept


class Phase(Enum):
    TRAIN = "train"
    PREFILL = "prefill"
    DECODE = "decode"


ALL_PHASES = frozenset(Phase)


@dataclass(frozen=True, slots=True)
class Case:
    """`return branch if condition`; of the phases it covers, the first case whose condition holds answers."""

    phases: frozenset[Phase]
    condition: Boolean | None
    branch: Branch
    extras: tuple[Extra, ...] = ()
    span: Span | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Expected:
    """The calls that a pattern is written for, as it says itself: its costs are judged by them, no call is bound."""

    length: int | None = None
    batch: int = 1
    page: int | None = None


@dataclass(frozen=True, slots=True)
class Pattern:
    name: str
    comment: str
    query_heads: int | None
    kv_heads: int | None
    qk_dim: int | None
    v_dim: int | None
    params: tuple[tuple[str, object], ...]
    causal: bool
    inputs: tuple[Input, ...]
    cases: tuple[Case, ...]
    expected: Expected = Expected()
    allowed: tuple[str, ...] = ()  # codes of warnings that are not told

    def input(self, name: str) -> Input:
        return next(known for known in self.inputs if known.name == name)

    def choice(self, name: str) -> Choice | None:
        return next((known for known in self.inputs if isinstance(known, Choice) and known.name == name), None)

    def softmaxes(self) -> tuple[Softmax, ...]:
        """Every softmax once, those of scores included, each after what it needs."""
        steps = [step for case in self.cases for step in self.steps(case)]
        return tuple(dict.fromkeys(step for step in steps if isinstance(step, Softmax)))

    def steps(self, case: Case) -> tuple[Softmax | Choice, ...]:
        """What a result computes, in an order in which each step follows what it reads."""
        found = [step for result in (case.branch, *case.extras) for step in self._steps(result)]
        return tuple(dict.fromkeys(found))

    def _steps(self, result: Extra) -> Iterator[Softmax | Choice]:
        match result:
            case Softmax():
                for choice in self.choices_of(result):
                    if choice.score is not None:
                        yield from self._steps(choice.score.softmax)
                    yield choice
                yield result
            case Gate() | Merge():
                for branch in result.branches:
                    yield from self._steps(branch)
            case Pooled():
                yield from self._steps(result.score.softmax)
            case Kept():
                yield from self._steps(result.softmax)
            case Kl():
                yield from self._steps(result.target)
                yield from self._steps(result.score)

    def choices_of(self, softmax: Softmax) -> tuple[Choice, ...]:
        """The choices that the tests of a softmax look up."""
        names = [lookup_name(read) for term in softmax.terms for read in lookups(term.test)]
        return tuple(dict.fromkeys(found for name in names if (found := self.choice(name))))

    def probabilities(self) -> frozenset[str]:
        """The softmaxes whose log-sum-exp a score needs."""
        scores = [choice.score for choice in self.inputs if isinstance(choice, Choice)]
        extras = [extra for case in self.cases for extra in case.extras]
        scores += [extra.score for extra in extras if isinstance(extra, Pooled)]
        scores += [part.score for extra in extras if isinstance(extra, Kl) for part in (extra.target, extra.score)]
        return frozenset(score.softmax.name for score in scores if score is not None and score.probability)

    @property
    def kept(self) -> tuple[Stream, ...]:
        """The compressed streams that prefill or decode read: a cache keeps their entries."""
        cases = dict.fromkeys((*self.cases_of(Phase.PREFILL), *self.cases_of(Phase.DECODE)))
        softmaxes = [step for case in cases for step in self.steps(case) if isinstance(step, Softmax)]
        read = {term.stream for softmax in softmaxes for term in softmax.terms}
        return tuple(one for one in self.inputs if isinstance(one, Stream) and one.compress and one.name in read)

    def outputs(self, case: Case) -> frozenset[str]:
        """The softmaxes whose output and log-sum-exp a result is made of; others serve scores only."""
        waiting: list[Extra] = [case.branch, *case.extras]
        found = set()
        while waiting:
            result = waiting.pop()
            if isinstance(result, Softmax):
                found.add(result.name)
            elif isinstance(result, Kept):
                found.add(result.softmax.name)
            elif isinstance(result, Gate | Merge):
                waiting += result.branches
        return frozenset(found)

    def cases_of(self, phase: Phase) -> tuple[Case, ...]:
        return tuple(case for case in self.cases if phase in case.phases)
