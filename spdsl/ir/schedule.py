"""What a call starts: steps over buffers, in the order of the launches.

A step is one launch of a kernel, or one function of the library that runs operators of torch. Generated code starts the
steps, the cost model adds up what they do, `spdsl compile --emit steps` prints them, and recorded launches are compared
with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

import sympy

from spdsl.ir.pattern import Choice, Phase, Stream
from spdsl.ir.plan import SoftmaxPlan
from spdsl.ir.symbols import Boolean


class Stage(Enum):
    """A call of one phase, or the backward of one."""

    FORWARD = "forward"
    BACKWARD = "backward"
    PREFILL = "prefill"
    DECODE = "decode"

    @property
    def phase(self) -> Phase:
        return {"prefill": Phase.PREFILL, "decode": Phase.DECODE}.get(self.value, Phase.TRAIN)


class Lifetime(Enum):
    """Who keeps a buffer."""

    CALLER = "caller"  # arguments, results and gradients
    CALL = "call"
    CACHE = "cache"


@dataclass(frozen=True, slots=True)
class Buffer:
    """A tensor that steps read and write.

    An axis is a size (B sequences, N queries, M keys, E entries, heads, dims) or the number that a pattern fixes.
    `capacity` is a bound on an axis, where sizes or data decide how much of it is used; `overflow` says what of more
    than that is left out.
    """

    name: str
    axes: tuple[str, ...]
    dtype: str  # or `as q`
    lifetime: Lifetime
    capacity: str = ""
    overflow: str = ""


class Event(Enum):
    """What a step of a cached phase waits for."""

    CALLED = "called"
    APPENDED = "appended"  # new tokens are in the cache
    CLOSED = "closed"  # so are the entries that they complete
    ATTENDED = "attended"  # all parts of a result are there


class When(Enum):
    """What sizes of a call decide about a step: where it does not hold, nothing is started."""

    ALWAYS = ""
    ENTRIES = "where the stream has entries"
    ONE_ENTRY = "where a sequence closes at most one entry"
    MORE_ENTRIES = "where a sequence may close several entries"
    SPLITS = "where several programs share a query"
    JOBS = "where tiles may be too many for one job"
    OTHER_TILES = "where tiles have other queries than those of dQ"
    NOT_MADE = "where no earlier result made the list"
    LEARNED = "where a tensor of the bias wants a gradient"
    SHARED_KEYS = "where lists share a key head"


class Kind(Enum):
    """What a step does. The cost model knows one amount of work for each."""

    # sets of units that are given or drawn
    MAP = "map"
    SORT = "sort"
    # the cache, and entries
    APPEND_ROWS = "append rows"
    APPEND_LENGTHS = "append lengths"
    CLOSE_CELLS = "close cells"
    TAKE_CELLS = "take cells"
    POOL_CELLS = "pool cells"
    PUT_ENTRIES = "put entries"
    CLOSE_SHORT = "close short"
    CLOSE_HIDDEN = "close hidden"
    CLOSE_OUTPUTS = "close outputs"
    ENTRIES = "entries"
    FIND_MAXIMA = "find maxima"
    SPREAD_ENTRIES = "spread entries"
    WEIGHT_SUMS = "weight sums"
    WEIGHTS_BACK = "weights back"
    # queries of cells
    POOL_QUERIES = "pool queries"
    POOL_QUERIES_BACK = "pool queries back"
    SPREAD_ROWS = "spread rows"
    SPREAD_ROWS_BACK = "spread rows back"
    # a softmax over ranges or lists of blocks
    CLASSES = "classes"
    TILES = "tiles"
    FORWARD = "forward"
    DECODE = "decode"
    DELTA = "delta"
    DQ = "dq"
    DKDV = "dkdv"
    BIAS = "bias"  # of any form
    BIAS_SUMS = "bias sums"
    CLASSES_BACK = "classes back"
    ADD_FRONT = "add front"
    SINK_GRADIENT = "sink gradient"
    # a softmax over the units of a choice
    UNIONS = "unions"
    UNIT_FORWARD = "unit forward"
    UNIT_DECODE = "unit decode"
    UNIT_DQ = "unit dq"
    INVERSE = "inverse"
    UNIT_DKDV = "unit dkdv"
    ADD_SLOTS = "add slots"
    # the same, keys outermost
    PAIRS = "pairs"
    PAIR_FORWARD = "pair forward"
    MERGE_PAIRS = "merge pairs"
    PAIR_DQ = "pair dq"
    ADD_PAIRS = "add pairs"
    PAIR_DKDV = "pair dkdv"
    # choices
    LIMITS = "limits"
    SETS = "sets"  # units that may be chosen, or are forced, token by token
    SELECT = "select"
    MERGE_RANKS = "merge ranks"
    SCORE_UNITS = "score units"
    MULTIPLY_CELLS = "multiply cells"
    SCORES_OF_UNITS = "scores of units"
    CUT = "cut"
    # results
    HOLDS = "holds"
    GATE = "gate"
    LSES = "lses"
    MERGE = "merge"
    MERGE_BY_TORCH = "merge by torch"
    JOIN = "join"
    SETTLE = "settle"
    GATE_BACK = "gate back"
    MERGE_BACK = "merge back"
    SUMS = "sums"
    # further results
    DIVERGENCE = "divergence"
    DIVERGENCE_DQ = "divergence dq"
    DIVERGENCE_DK = "divergence dk"
    ADD_KEY_SLOTS = "add key slots"
    KEY_PARTS = "key parts"
    SCORES = "scores"
    SCORES_BACK = "scores back"


@dataclass(frozen=True, slots=True)
class Side:
    """The keys (`k`) or the values (`v`) of a compressed stream."""

    stream: Stream
    name: str


@dataclass(frozen=True, slots=True)
class Walk:
    """A divergence whose kernels walk the units of `choice`; `name` is that of the result."""

    name: str
    target: SoftmaxPlan
    score: SoftmaxPlan
    choice: Choice


@dataclass(frozen=True, slots=True)
class Scores:
    """A further result that torch computes: the softmaxes whose logits it is made of, of a divergence target first.

    `choice`: its lists hold all entries that count.
    """

    name: str
    sides: tuple[SoftmaxPlan, ...]
    choice: Choice | None = None


@dataclass(frozen=True, slots=True)
class Gradient:
    """What one part of a backward has of the gradient of a tensor.

    Of gates, of a side of a stream, or of a softmax its query, its sink or its output, as the name says.
    """

    name: str
    softmax: SoftmaxPlan | None = None
    side: Side | None = None


Of = TypeVar("Of", covariant=True)


@dataclass(frozen=True, slots=True)
class Step(Generic[Of]):
    """One launch, or one run of operators of torch, of the part `of` of a plan."""

    kind: Kind
    name: str  # in reports
    of: Of
    kernel: str = ""  # what is launched; empty: operators of torch
    rows: str = ""  # of a program
    visit: str = ""  # what each program walks
    reads: tuple[Buffer, ...] = ()
    writes: tuple[Buffer, ...] = ()
    filled: tuple[Buffer, ...] = ()  # of what it writes: by torch, with what a program leaves where it has no row
    table: str = ""  # of configurations, that its tiles are of
    part: str = ""  # of the module: the softmax, joint, choice or result that it is computed for
    index: int = 0  # of its sweep, or of the read of its bias, where each has a step
    case: int | None = None  # of the phase; None: whichever answers
    event: Event = Event.CALLED
    when: When = When.ALWAYS
    wanted: Boolean = sympy.true
    """On `length`: where it is false another result answers, and the programs return at once."""
    turns_of: str = ""
    """Heads or rows: with its neighbours once for as many of them at a time as have room for what is between."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """The steps of one stage, and on which condition each case of its phase answers (None: always)."""

    stage: Stage
    steps: tuple[Step[object], ...]
    conditions: tuple[Boolean | None, ...]
