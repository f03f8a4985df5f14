"""estimate: what a stage of a pattern costs at some lengths beside dense attention, and where it overtakes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import lcm

from spdsl.cost.crossing import Crossing, crossings
from spdsl.cost.interpolate import interpolate, period
from spdsl.cost.kernels import USUAL, Kernel, Options, added
from spdsl.cost.machine import machine_of
from spdsl.cost.phases import Stage, kernels
from spdsl.cost.roofline import dense_seconds, seconds, selecting_share
from spdsl.ir.plan import Plan
from spdsl.passes.count import Number, Shape
from spdsl.targets import Target

_GRAIN = 64


@dataclass(frozen=True, slots=True)
class Point:
    """One call at one length."""

    length: int
    kernels: tuple[Kernel, ...]
    seconds: float
    dense: float
    selecting: float
    """The share of the time that scoring, choosing and making lists take."""

    @property
    def ratio(self) -> float:
        """How many times faster than dense."""
        return self.dense / self.seconds

    @property
    def flops(self) -> Number:
        return added(kernel.flops for kernel in self.kernels)

    @property
    def machine(self) -> Number:
        return added(kernel.machine for kernel in self.kernels)

    @property
    def bytes(self) -> Number:
        return added(kernel.bytes for kernel in self.kernels)

    @property
    def moved(self) -> Number:
        return added(kernel.moved for kernel in self.kernels)

    @property
    def launches(self) -> int:
        return sum(kernel.launches for kernel in self.kernels)

    @property
    def operators(self) -> int:
        return sum(kernel.operators for kernel in self.kernels)

    @property
    def exact(self) -> bool:
        return self.machine.exact and self.moved.exact


@dataclass(frozen=True, slots=True)
class Curve:
    """A stage on a GPU over rising lengths."""

    stage: Stage
    target: Target
    shape: Shape
    points: tuple[Point, ...]
    crossings: tuple[Crossing, ...]

    @property
    def wins_first(self) -> bool:
        return self.points[0].seconds < self.points[0].dense


def point(plan: Plan, stage: Stage, length: int, shape: Shape, target: Target, options: Options) -> Point:
    """Raises DependsOnData where the result that answers is not known, ValueError for a dtype that the GPU lacks."""
    started = kernels(plan, stage, length, shape, machine_of(target), options)
    dense = dense_seconds(stage, length, shape, target, plan.pattern.causal)
    time, share = seconds(started, target, shape.size), selecting_share(started, target, shape.size)
    return Point(length, tuple(started), time, dense, share)


def curve(
    plan: Plan, stage: Stage, lengths: Sequence[int], shape: Shape, target: Target, options: Options = USUAL
) -> Curve:
    """The points at `lengths`, and the changes between them to the next grain of about 1 % of the length."""
    points = [point(plan, stage, length, shape, target, options) for length in lengths]
    known = {point.length: point.kernels for point in points}
    whole = period(plan, shape, target)

    @cache
    def cost(length: int) -> float:
        started = known.get(length) or interpolate(known, length, whole)
        return seconds(started or kernels(plan, stage, length, shape, machine_of(target), options), target, shape.size)

    @cache
    def dense(length: int) -> float:
        return dense_seconds(stage, length, shape, target, plan.pattern.causal)

    grain = lcm(whole, _GRAIN) if whole <= _GRAIN * 4 else whole
    fine = grain if lengths[0] >= grain else 1
    return Curve(stage, target, shape, tuple(points), tuple(crossings(cost, dense, lengths, fine)))


def doubling(first: int, last: int) -> list[int]:
    """first, twice that, and so on, then last."""
    lengths = [first]
    while lengths[-1] * 2 < last:
        lengths.append(lengths[-1] * 2)
    return lengths if last == first else [*lengths, last]
