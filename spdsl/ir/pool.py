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
class Operators:
    """The operators of torch that make the entries of one side, K or V, as the tests count them in modules.

    `clipped` and `clipped_backward` come on top where cells may be clipped: absent tokens are masked. For a chunk in a
    cache (`Closing.CELLS`) they are `closing`, `closing_clipped` more, and `closing_alone` less for a batch of 1.
    """

    forward: int
    backward: int
    clipped: int = 0
    clipped_backward: int = 0
    closing: int = 0
    closing_clipped: int = 0
    closing_alone: int = 0


@dataclass(frozen=True, slots=True)
class Pool:
    """weights: of each role the axes, `heads`, `width`, `dim` (of the side) and `hidden` (any size).

    `weighs` pools are written `name(stream)`: keys of that stream weigh the tokens. In `attention` kernels make the
    entries of a side, `kernels` = (forward, backward) of them, or torch does, with `operators`. An entry takes
    `flops(width, dim, hidden)`, or `each` for a number of a token.
    """

    name: str
    weights: tuple[tuple[str, tuple[str, ...]], ...] = ()
    weighs: bool = False
    kernels: tuple[int, int] | None = None
    operators: Operators | None = None
    closing: Closing = Closing.STREAMED
    each: int = 1
    flops: Callable[[int, int, int], int] | None = None
    twice: tuple[str, ...] = ()  # the roles of weights that torch reads twice

    def work(self, width: int, dim: int, hidden: int) -> int:
        """FLOPs of an entry of `dim` numbers."""
        return self.each * width * dim if self.flops is None else self.flops(width, dim, hidden)
