"""fit: level x length = a exp(b s), a line through the logarithms, from the margins of tiles at several lengths."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LEVELS = 64  # points of a length that the line is drawn through
FITTED = (0.05, 0.95)  # sparsities between which it is: no curve is a line where all or nothing is left out


@dataclass(frozen=True, slots=True)
class Curve:
    """The margins of the tiles of one length, natural logarithms, rising."""

    length: int
    margins: tuple[float, ...]

    @classmethod
    def of(cls, length: int, margins: Sequence[float]) -> Curve:
        return cls(length, tuple(sorted(margins)))

    def sparsity(self, level: float) -> float:
        """The share of tiles that are left out at a level; one above 1 counts as 1, 0 or less leaves out nothing."""
        if level <= 0:
            return 0.0
        return bisect_left(self.margins, min(0.0, math.log(level))) / len(self.margins)

    @property
    def most(self) -> float:
        return self.sparsity(1.0)

    def level(self, sparsity: float) -> float:
        """The least level known to leave out that share: just above the margin of the last such tile."""
        last = self.margins[max(0, math.ceil(sparsity * len(self.margins)) - 1)]
        return math.exp(last)


@dataclass(frozen=True, slots=True)
class Calibration:
    """level = a exp(b s) / length for a wanted sparsity s."""

    log_a: float
    b: float
    points: tuple[tuple[int, float, float], ...]
    """(length, sparsity, log(level x length)) that the line was drawn through."""
    error: float
    """Root mean square of the line's distance from the points, in sparsity."""

    def scale(self, sparsity: float) -> float:
        """level x length."""
        return math.exp(self.log_a + self.b * sparsity)

    def reached(self, curves: Sequence[Curve], sparsity: float) -> dict[int, float]:
        """What the level for a wanted sparsity leaves out at each length."""
        return {curve.length: curve.sparsity(self.scale(sparsity) / curve.length) for curve in curves}


def calibrated(curves: Sequence[Curve], wanted: Sequence[float]) -> Calibration:
    """The line through the curves. Raises ValueError if a wanted sparsity is none, or more than the data reach."""
    if not curves or any(not curve.margins for curve in curves):
        raise ValueError("no tiles: the data hold no query that sees a key")
    for sparsity in wanted:
        if not 0 < sparsity < 1:
            raise ValueError(f"sparsity: expected numbers between 0 and 1, got {sparsity:g}")
    least = min(curves, key=lambda curve: curve.most)
    for sparsity in wanted:
        if sparsity > least.most:
            raise ValueError(
                f"sparsity: {sparsity:g} cannot be reached: at {least.length:,} tokens no more than "
                f"{least.most:.3f} of the tiles lie below the running maximum, which is what the level 1 leaves out"
            )
    points = [point for curve in curves for point in _points(curve)]
    if len({sparsity for _, sparsity, _ in points}) < 2:
        raise ValueError(f"too few tiles: {sum(len(curve.margins) for curve in curves)} do not make a line")
    log_a, b = _line([sparsity for _, sparsity, _ in points], [scale for _, _, scale in points])
    off = [(sparsity - (scale - log_a) / b) ** 2 if b else math.inf for _, sparsity, scale in points]
    return Calibration(log_a, b, tuple(points), math.sqrt(sum(off) / len(off)))


def _points(curve: Curve) -> list[tuple[int, float, float]]:
    """At equal distances in sparsity, as far as levels reach."""
    first, last = FITTED[0], min(FITTED[1], curve.most)
    steps = [first + (last - first) * i / (LEVELS - 1) for i in range(LEVELS)] if last > first else []
    levels = dict.fromkeys(curve.level(step) * (1 + 1e-12) for step in steps)
    found = [(curve.length, curve.sparsity(level), math.log(level * curve.length)) for level in levels if level > 0]
    return [point for point in found if 0 < point[1] <= curve.most]


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Least squares: y = first + second * x."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    across = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / across
    return mean_y - slope * mean_x, slope


def params(found: Calibration, names: Mapping[float, str]) -> dict[str, float]:
    """The scale of each wanted sparsity by the name of a parameter, as `-D name=value` takes it."""
    return {name: float(f"{found.scale(sparsity):.6g}") for sparsity, name in names.items()}
