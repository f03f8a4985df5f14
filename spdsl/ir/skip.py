"""A running skip: tiles of queries and keys that a softmax leaves out while it runs."""

from __future__ import annotations

from dataclasses import dataclass

from spdsl.ir.symbols import Expr


@dataclass(frozen=True, slots=True)
class Skip:
    """A tile is `rows` queries of a head (`share = head`) or of all heads of a group, times `unit` keys.

    Tiles are visited with rising keys. One is left out if each of its rows sees nothing in it, or logits below
    the running maximum of the row, over the tiles kept so far, plus log(min(level, 1)). The maximum begins anew at keys
    that `restart` divides; 0: never. `level` reads `h`, `length` and tensors without positions.
    """

    level: Expr
    rows: int
    unit: int
    restart: int
    share: str
