"""A kernel is rows x visit: which queries and heads the rows of a program are, and which keys they meet.

Rows stay and keys pass by, or, keys outermost, keys stay and the rows pass by that chose them. dK and dV turn either
visit around: keys stay, whatever the forward does.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from spdsl.ir.choice import Choice
from spdsl.ir.symbols import Boolean, Expr


@dataclass(frozen=True, slots=True)
class Range:
    """Visit [first, end) if `condition`; if `full`, every pair of the tile is visible in [full_first, full_end)."""

    first: Expr
    end: Expr
    condition: Boolean
    full_first: Expr
    full_end: Expr
    full: Boolean


@dataclass(frozen=True, slots=True)
class Ranges:
    """Ends that a kernel computes from the corners of its tile.

    `keys`, and `rows`, the transpose for dK and dV, come in an order in which a running cursor visits no block twice.
    """

    keys: tuple[Range, ...]
    rows: tuple[Range, ...]

    def __str__(self) -> str:
        return "ranges"


@dataclass(frozen=True, slots=True)
class TileMap:
    """Full and partial tiles, listed on the device before the launch: those where a pair `may`, or all `must`, pass."""

    may: Boolean
    must: Boolean

    def __str__(self) -> str:
        return "tile map"


class Order(Enum):
    ROWS = "rows outermost"  # a tile visits the union of the units of its queries
    KEYS = "keys outermost"  # a unit meets the queries that chose it, and parts of outputs are merged


@dataclass(frozen=True, slots=True)
class Units:
    """The units of `choice.unit` keys that a list names for each query, down to single keys, which are gathered."""

    choice: Choice
    order: Order

    def __str__(self) -> str:
        return "units" if self.order is Order.ROWS else f"units, {self.order.value}"


Visit = Ranges | TileMap | Units


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a program: these queries, times these heads."""

    queries: str
    heads: str = ""

    def __str__(self) -> str:
        return f"{self.queries} x {self.heads}" if self.heads else self.queries


TILE = Rows("neighbouring queries of a head")
PACKED = Rows("neighbouring queries", "the heads of a list")
CHOSEN = Rows("queries of a head that chose a unit")
