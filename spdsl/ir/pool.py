"""What the compiler knows of a pool, the way from the tokens of a cell to its entry: one record for each.

A record says what the language, the plan and the cost model need. The library has a record of the same name with the
functions that compute it; the oracle has its formula.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum


class Closing(Enum):
    """How entries that close in a cache are made on a GPU."""

    STREAMED = "streamed"  # by one kernel, from tokens to entries
    NETWORK = "network"  # by two where a sequence closes one entry at most, a kernel for each layer; else as CELLS
    CELLS = "cells"  # a kernel takes cells together, torch makes entries of them, a kernel keeps those that closed


@dataclass(frozen=True, slots=True)
class Pool:
    """weights: of each role the axes, `heads`, `width`, `dim` (of the side) and `hidden` (any size).

    `weighs` pools are written `name(stream)`: keys of that stream weigh the tokens. In `attention` a kernel makes the
    entries of a side, and those of `backward` its gradients, in this order; without them torch does both. An entry
    takes `flops(width, dim, hidden)`, or `each` for a number of a token.
    """

    name: str
    weights: tuple[tuple[str, tuple[str, ...]], ...] = ()
    weighs: bool = False
    backward: tuple[str, ...] = ()
    closing: Closing = Closing.STREAMED
    each: int = 1
    flops: Callable[[int, int, int], int] | None = None
    twice: tuple[str, ...] = ()  # the roles of weights that torch reads twice
    named: bool = True  # whether `by =` of `compress` may say it; else a score is made of its entries

    def work(self, width: int, dim: int, hidden: int) -> int:
        """FLOPs of an entry of `dim` numbers."""
        return self.each * width * dim if self.flops is None else self.flops(width, dim, hidden)
