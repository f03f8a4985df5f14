"""What a pattern means: inputs, softmaxes over terms, branches, results.

Every pattern reduces to *branches -> softmax groups -> terms*. A term is the entries of one stream that pass one
element test; a set that is computed or given (`Choice`) appears in the test as a lookup into its membership map,
so that all sets are one kind of thing: a Boolean over `q`, `k`, `h`, `length` and lookups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

import sympy

from spdsl.diagnostics import Span
from spdsl.ir.product import DOT, Product
from spdsl.ir.rule import Drawn, Given, Rule, Threshold, TopK
from spdsl.ir.symbols import Boolean, Expr, lookup_name, lookups

LEAST_BLOCK = 16  # keys of the smallest matrix product: units and pages hold whole blocks


class Phase(Enum):
    TRAIN = "train"
    PREFILL = "prefill"
    DECODE = "decode"


ALL_PHASES = frozenset(Phase)


@dataclass(frozen=True, slots=True)
class Grid:
    """Where the entries of a stream lie on the tokens: entry i covers `width` of them from i*stride - before on.

    Tokens before the sequence are not there, nor is a cell that is not whole at the end, unless it is `partial`: then
    the first of them is the last entry, and each token lies in some cell.
    """

    width: int = 1
    stride: int = 1
    before: int = 0
    partial: bool = False

    @property
    def is_tokens(self) -> bool:
        return (self.width, self.stride, self.before) == (1, 1, 0)

    @property
    def is_units(self) -> bool:
        """Whether entry i is the unit i of `stride` tokens."""
        return (self.width, self.before) == (self.stride, 0)

    @property
    def is_clipped(self) -> bool:
        """Whether some cells have less than `width` tokens."""
        return self.before > 0 or self.partial

    def overlapping(self, unit: int) -> range:
        """The entries that share tokens with unit 0, the first `unit` tokens, those before the sequence too."""
        first = -(-(1 - self.width + self.before) // self.stride)
        return range(first, -(-(unit + self.before) // self.stride))

    def count(self, tokens: int) -> int:
        """The entries of a sequence."""
        whole = max(0, (tokens + self.before - self.width) // self.stride + 1)
        if not self.partial:
            return whole
        return min(tokens, max(1, -((self.width - self.before - tokens) // self.stride) + 1))


@dataclass(frozen=True, slots=True)
class Query:
    """Vectors that ask: argument `name` [B, heads, N, dim]."""

    name: str
    heads: int | None = None
    dim: int | None = None
    span: Span | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Compress:
    """Entries made of the tokens of another stream: one for each cell of the grid, from K and from V apart.

    `by` names the pool, how a cell becomes an entry; `logits` the stream whose keys weigh the tokens, if it has any.
    """

    source: str  # a stream on the token grid
    by: str
    logits: str | None = None


class Values(Enum):
    """Where a stream's V comes from: an argument of its own, the first v columns of K, or nowhere."""

    OWN = "own"
    KEY = "key"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Stream:
    """Entries on a grid: arguments `k_name` [B, heads, M, qk] and `v_name` [B, heads, M, v] (`k`, `v` for `kv`).

    With `compress` they are computed from another stream and no arguments.
    """

    name: str
    heads: int | None = None
    qk: int | None = None
    v: int | None = None
    value: Values = Values.OWN
    lanes: int = 1
    grid: Grid = Grid()
    compress: Compress | None = None
    span: Span | None = field(default=None, compare=False)

    @property
    def key_argument(self) -> str:
        return "k" if self.name == "kv" else f"k_{self.name}"

    @property
    def value_argument(self) -> str | None:
        if self.value is not Values.OWN:
            return None
        return "v" if self.name == "kv" else f"v_{self.name}"


@dataclass(frozen=True, slots=True)
class Tensor:
    """Numbers from the caller: argument `name` [B, *axes], or [*axes] with no batch; no axes: a scalar on the device.

    An axis is `head`, `kv_head`, `query`, `token` or a size.
    """

    name: str
    axes: tuple[str | int, ...]
    dtype: str  # float | int | bool
    span: Span | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Weight:
    """A learned tensor of a compressed stream: argument `name`, no batch, with gradient.

    An axis is a size or `heads`, `qk`, `v` (of the stream) or `hidden` (any size, one per stream and side).
    """

    name: str  # <stream>_<k or v>_<role>
    stream: str
    axes: tuple[str | int, ...]
    span: Span | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Grain:
    """What a score has numbers for: each head of `query`, each tile of `rows` queries, each entry of `stream`."""

    query: str
    rows: int
    stream: str


@dataclass(frozen=True, slots=True)
class Logits:
    """A score: the logits of a softmax, which stands here alone (only they are computed, no output) or is a branch."""

    softmax: Softmax
    probability: ClassVar[bool] = False

    @property
    def grain(self) -> Grain:
        return Grain(self.softmax.query, 1, self.softmax.terms[0].stream)


@dataclass(frozen=True, slots=True)
class Mass:
    """A score: the probabilities of a softmax, exp(logit - lse). One that is no branch is computed for its lse only."""

    softmax: Softmax
    probability: ClassVar[bool] = True

    @property
    def grain(self) -> Grain:
        return Grain(self.softmax.query, 1, self.softmax.terms[0].stream)


Score = Logits | Mass


@dataclass(frozen=True, slots=True)
class Choice:
    """A set that is given, drawn or selected, not computed from positions: units of `unit` keys for tiles of `rows`
    queries.

    Its test is `name(scope, q // rows, k // unit) != 0`. `rule` says which units are in the set. A given one is the
    argument `name` [B, heads, row tiles, most], unit indices padded with -1; a threshold takes no fewer than `least` of
    the best that have a score, and no more than `most`.

    A score is reduced over heads, then rows, then the entries of a unit, by `heads_by`, `rows_by` and `unit_by` (`sum`,
    `mean`, `max`; None where there is nothing to reduce). `sum` over entries weighs each by overlap / stride.
    `force` and `within` are sets of whole units as tests over the positions q and k: a unit is forced, or a candidate,
    if any of its tokens passes. Forced units count towards `count`, `least` and `most`; ties go to the lowest index.
    """

    name: str
    rule: Rule
    unit: int
    rows: int
    share: str  # head: one set per query head; group: one per kv head
    least: int = 0
    most: int | None = None
    score: Score | None = None
    heads_by: str | None = None
    rows_by: str | None = None
    unit_by: str | None = None
    force: Boolean = sympy.false
    within: Boolean = sympy.true
    span: Span | None = field(default=None, compare=False)

    @property
    def selected(self) -> bool:
        """Computed from a score, unless the caller passes it."""
        return self.score is not None

    @property
    def given(self) -> bool:
        """Passed by the caller, always."""
        return isinstance(self.rule, Given)

    @property
    def count(self) -> int | None:
        """How many units the rule takes, where it says so: the most, where the call does."""
        return self.rule.count.bound if isinstance(self.rule, TopK | Drawn) else None

    @property
    def level(self) -> float | None:
        """The least score of a unit, where the rule has one."""
        return float(self.rule.level) if isinstance(self.rule, Threshold) else None

    @property
    def capacity(self) -> int | None:
        """The most units of one list."""
        return self.count if isinstance(self.rule, TopK) else self.most

    @property
    def sized(self) -> bool:
        """Whether no score decides how many units are chosen, only which of those that have one."""
        return isinstance(self.rule, TopK) or self.least == self.most


Input = Query | Stream | Tensor | Weight | Choice


@dataclass(frozen=True, slots=True)
class Term:
    """The entries of `stream` that pass `test`; `causal` is part of the test already."""

    stream: str
    test: Boolean
    span: Span | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Softmax:
    """One normaliser over terms of any streams, each stream at most once."""

    name: str
    query: str
    terms: tuple[Term, ...]
    scale: Expr | None = None  # None: 1 / sqrt(head_dim of q)
    bias: Expr | None = None  # added to the scaled logits, over q, k, h, length and lookups
    softcap: float | None = None
    sink: str | None = None  # a Tensor with the axis `head`: a logit in the denominator only
    span: Span | None = field(default=None, compare=False)
    product: Product = DOT  # of a query and a key


@dataclass(frozen=True, slots=True)
class Gate:
    """The plain sum of branches times the caller's `gates` [B, Hq, N, branches]."""

    branches: tuple[Branch, ...]
    span: Span | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Merge:
    """The exact log-sum-exp merge of branches over disjoint keys."""

    branches: tuple[Branch, ...]
    span: Span | None = field(default=None, compare=False)


Branch = Softmax | Gate | Merge


def leaves(branch: Branch) -> int:
    """The softmaxes of a branch, repetitions counted."""
    return 1 if isinstance(branch, Softmax) else sum(leaves(inner) for inner in branch.branches)


@dataclass(frozen=True, slots=True)
class Pooled:
    """A score as a further result: float [B, heads, row tiles, units], heads and reductions as in `Choice`."""

    score: Score
    unit: int
    rows: int
    share: str
    heads_by: str | None = None
    rows_by: str | None = None
    unit_by: str | None = None
    span: Span | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Kl:
    """KL(target || score) per (head, row) as a further result, [B, heads, N]; its gradient reaches the score only.

    Both are taken as distributions over the entries that the target's softmax sees.
    """

    target: Pooled
    score: Pooled
    span: Span | None = field(default=None, compare=False)


Extra = Softmax | Gate | Merge | Pooled | Kl


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
            elif isinstance(result, Gate | Merge):
                waiting += result.branches
        return frozenset(found)

    def cases_of(self, phase: Phase) -> tuple[Case, ...]:
        return tuple(case for case in self.cases if phase in case.phases)
