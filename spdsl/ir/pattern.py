"""What a pattern means: inputs, softmaxes over terms, branches, results.

Every pattern reduces to *branches -> softmax groups -> terms*. A term is the entries of one stream that pass one
element test; a set that is computed or given (`Choice`) appears in the test as a lookup into its membership map,
so that all sets are one kind of thing: a Boolean over `q`, `k`, `h`, `length` and lookups.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from spdsl.diagnostics import Span
from spdsl.ir.symbols import Boolean, Expr


class Phase(Enum):
    TRAIN = "train"
    PREFILL = "prefill"
    DECODE = "decode"


ALL_PHASES = frozenset(Phase)


@dataclass(frozen=True, slots=True)
class Grid:
    """Where the entries of a stream lie on the tokens: entry i covers `width` of them from i*stride - before on."""

    width: int = 1
    stride: int = 1
    before: int = 0
    partial: bool = False

    @property
    def is_tokens(self) -> bool:
        return (self.width, self.stride, self.before) == (1, 1, 0)


@dataclass(frozen=True, slots=True)
class Query:
    """Vectors that ask: argument `name` [B, heads, N, dim]."""

    name: str
    heads: int | None = None
    dim: int | None = None
    span: Span | None = field(default=None, compare=False)


class Values(Enum):
    """Where a stream's V comes from: an argument of its own, the first v columns of K, or nowhere."""

    OWN = "own"
    KEY = "key"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Stream:
    """Entries on a grid: arguments `k_name` [B, heads, M, qk] and `v_name` [B, heads, M, v] (`k`, `v` for `kv`)."""

    name: str
    heads: int | None = None
    qk: int | None = None
    v: int | None = None
    value: Values = Values.OWN
    lanes: int = 1
    grid: Grid = Grid()
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
class Choice:
    """A set that is given or drawn, not computed from positions: units of `unit` keys for tiles of `rows` queries.

    Its test is `name(scope, q // rows, k // unit) != 0`. `rule` is `given` (argument `name`
    [B, heads, row tiles, most], unit indices padded with -1) or `random` (`count` units of those visible, by `seed`).
    """

    name: str
    rule: str
    unit: int
    rows: int
    share: str  # head: one set per query head; group: one per kv head
    count: int | None = None
    seed: int = 0
    most: int | None = None
    span: Span | None = field(default=None, compare=False)


Input = Query | Stream | Tensor | Choice


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


@dataclass(frozen=True, slots=True)
class Case:
    """`return branch if condition`; of the phases it covers, the first case whose condition holds answers."""

    phases: frozenset[Phase]
    condition: Boolean | None
    branch: Branch
    extras: tuple[Branch, ...] = ()
    span: Span | None = field(default=None, compare=False)


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

    def input(self, name: str) -> Input:
        return next(known for known in self.inputs if known.name == name)

    def choice(self, name: str) -> Choice | None:
        return next((known for known in self.inputs if isinstance(known, Choice) and known.name == name), None)

    def softmaxes(self) -> tuple[Softmax, ...]:
        """Every softmax once, in the order in which results reach them."""
        found: dict[str, Softmax] = {}
        waiting = [branch for case in self.cases for branch in (case.branch, *case.extras)]
        while waiting:
            branch = waiting.pop(0)
            if isinstance(branch, Softmax):
                found.setdefault(branch.name, branch)
            else:
                waiting = [*branch.branches, *waiting]
        return tuple(found.values())

    def cases_of(self, phase: Phase) -> tuple[Case, ...]:
        return tuple(case for case in self.cases if phase in case.phases)
