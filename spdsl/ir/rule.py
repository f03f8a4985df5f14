"""Rules: how the units of a choice come about. A rule is a record; `Choice` says of what grains its score is.

`Sample` is specified; no word makes it yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from spdsl.ir.symbols import Expr


@dataclass(frozen=True, slots=True)
class Size:
    """A number of units: an integer, or known at the call and then never above `most`, the declared bound."""

    value: Expr
    most: int | None = None

    @classmethod
    def of(cls, number: int) -> Size:
        return cls(sympy.Integer(number))

    @property
    def bound(self) -> int | None:
        """The number, or the greatest that it can be at a call."""
        return int(self.value) if self.value.is_Integer else self.most


@dataclass(frozen=True, slots=True)
class TopK:
    """The `count` units of highest score."""

    count: Size


@dataclass(frozen=True, slots=True)
class TopP:
    """The fewest units of highest score whose sum is at least `part` of that of all candidates (`above`), or the most
    whose sum is no more (`below`). From 1 on it is every unit with a score above 0.
    """

    part: Expr
    side: str = "above"


@dataclass(frozen=True, slots=True)
class Threshold:
    """The units of a score >= `level`."""

    level: Expr


@dataclass(frozen=True, slots=True)
class Sample:
    """Units drawn with weights: `count` of them, or so many that errors above `epsilon` have a probability of `delta`,
    by the variance of a share `pilot` of all.
    """

    count: Size | None
    epsilon: float = 0.0
    delta: float = 0.0
    pilot: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Given:
    """The units that the caller passes."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """`count` units of those visible, by a hash of `seed`."""

    count: Size
    seed: int = 0


Rule = TopK | TopP | Threshold | Sample | Given | Drawn
