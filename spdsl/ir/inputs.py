"""What a pattern reads: queries, streams and the cells of their entries, tensors, learned weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from spdsl.diagnostics import Span


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
class QueryCells:
    """Cells of `width` neighbouring queries of `source`, those with one position // width, each made one query `by`
    mean or max of those that a call holds.
    """

    source: str
    width: int
    by: str


@dataclass(frozen=True, slots=True)
class QueryTail:
    """The last `count` queries of `source` in a call, of each sequence; of fewer all."""

    source: str
    count: int


@dataclass(frozen=True, slots=True)
class Query:
    """Vectors that ask: argument `name` [B, heads, N, dim].

    With `cells` they are no argument: one for each cell. With `tail` they are the last ones of another query.
    """

    name: str
    heads: int | None = None
    dim: int | None = None
    cells: QueryCells | None = None
    tail: QueryTail | None = None
    span: Span | None = field(default=None, compare=False)

    @property
    def source(self) -> str | None:
        """The query that it is made of."""
        made = self.cells or self.tail
        return None if made is None else made.source

    @property
    def width(self) -> int:
        """Queries of one."""
        return 1 if self.cells is None else self.cells.width

    @property
    def by(self) -> str:
        """How it is made of its source."""
        return self.cells.by if self.cells else "tail" if self.tail else ""


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

    @property
    def by_row(self) -> bool:
        """Whether it is of the rows of one call, which brings it whole: its token axis has any length."""
        return "query" in self.axes

    @property
    def by_pair(self) -> bool:
        """Whether a row has several numbers for each head, so that kernels load one for each pair."""
        return self.by_row and any(axis not in ("head", "kv_head", "query") for axis in self.axes)

    @property
    def by_token(self) -> bool:
        """Whether it is as long as the sequence: what a cache keeps."""
        return "token" in self.axes and not self.by_row

    @property
    def axes_to_tokens(self) -> tuple[str | int, ...]:
        """The axes up to the last one of tokens."""
        places = [i for i, axis in enumerate(self.axes) if axis == "token"]
        return self.axes[: places[-1] + 1] if places else ()


@dataclass(frozen=True, slots=True)
class Weight:
    """A learned tensor of a compressed stream: argument `name`, no batch, with gradient.

    An axis is a size or `heads`, `qk`, `v` (of the stream) or `hidden` (any size, one per stream and side).
    """

    name: str  # <stream>_<k or v>_<role>
    stream: str
    axes: tuple[str | int, ...]
    span: Span | None = field(default=None, compare=False)
