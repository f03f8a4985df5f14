"""What a bias reads of a float tensor, and how the gradient of the tensor is summed.

An element of it gets the gradient of each logit whose bias reads it, times the derivative of the bias by the read.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import sympy

from spdsl.ir.inputs import Tensor
from spdsl.ir.symbols import Expr, H, K, Q


class Place(Enum):
    """Which elements the rows and keys of a tile read: so many sums it has, and that is where they go."""

    HEAD = "one of a head"
    ROW = "one of a row"  # on an axis of tokens or rows
    KEY = "one of a key"
    TABLE = "of a table"  # by row or key, on axes of declared sizes
    PAIR = "one of a pair"  # at [q] and [k] themselves
    OTHER = "by row and key, on an axis of the caller's size"


@dataclass(frozen=True, slots=True)
class BiasRead:
    """A read of `tensor` in a bias, and the derivative of the bias by it."""

    tensor: Tensor
    read: Expr
    slope: Expr

    @property
    def moving_axes(self) -> tuple[int, ...]:
        """The axes that are read by row or key."""
        return tuple(i for i, index in enumerate(self.read.args) if index.free_symbols & {Q, K})

    @property
    def place(self) -> Place:
        known = self.read.free_symbols & {Q, K}
        if not known:
            return Place.HEAD
        axes = [(self.tensor.axes[i], self.read.args[i]) for i in self.moving_axes]
        if all(isinstance(axis, int) for axis, _ in axes):
            return Place.TABLE
        if K not in known:
            return Place.ROW
        if Q not in known:
            return Place.KEY
        exact = [index for axis, index in axes if axis in ("token", "query")]
        return Place.PAIR if len(axes) == 2 and set(exact) == {Q, K} else Place.OTHER

    @property
    def by_distance(self) -> bool:
        """Whether the element depends on q - k alone."""
        distance = sympy.Symbol("distance", integer=True)
        moved = [sympy.expand(index.xreplace({Q: K + distance})) for index in self.read.args]
        return not any(index.free_symbols & {Q, K} for index in moved)

    @property
    def by_head(self) -> bool:
        """Whether each query head reads elements of its own."""
        return any(axis == "head" and index == H for axis, index in zip(self.tensor.axes, self.read.args, strict=True))
