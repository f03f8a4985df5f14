"""What the passes from the pattern to the plan make of a body, and what analyses find in the plan, line by line."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import sympy

from spdsl.diagnostics import Source
from spdsl.ir.pattern import Kl
from spdsl.ir.plan import Plan, SoftmaxPlan
from spdsl.ir.visit import Range
from spdsl.passes.aligned import aligned as shortest
from spdsl.passes.bias_reads import bias_reads as differentiated
from spdsl.passes.count import Count, Shape, shape_of
from spdsl.passes.disjuncts import disjuncts as conjuncts_of
from spdsl.passes.divergence import list_of, walked_by
from spdsl.passes.joint import joints
from spdsl.passes.listed import listed as walked
from spdsl.passes.overlap import Overlaps
from spdsl.passes.partition import partition as planned
from spdsl.passes.ranges import key_range, ordered, row_range
from spdsl.passes.read_lengths import read_lengths as read_at
from spdsl.passes.resident import resident as still_seen
from spdsl.passes.residues import residues as class_of
from spdsl.passes.selection import selection as choice_plan
from spdsl.passes.series import Trace
from spdsl.passes.split import split as taken_apart
from spdsl.passes.tidy import tidy as shorter
from spdsl.passes.tile_choices import in_tiles
from spdsl.passes.visible import DependsOnData, Visible
from tests.passes.language import branch, tests
from tests.passes.lowered import lowered


def plan_of(body: str) -> Plan:
    return planned(taken_apart(lowered(body)), Source(body))


def disjuncts(body: str) -> Iterator[str]:
    return (str(conjunct.test()) for test in _terms(body) for conjunct in conjuncts_of(test))


def bias_reads(body: str) -> Iterator[str]:
    """Of each softmax; what of its bias gets none comes last."""
    for softmax in plan_of(body).softmaxes:
        yield from (f"{read.read}: {read.place.value}, slope {read.slope}" for read in softmax.bias_reads)
        for read in differentiated(softmax.softmax.bias, softmax.reads):
            if read not in softmax.bias_reads:
                yield f"no gradient of {read.tensor.name}: {read.read} is {read.place.value}"


def tile_choices(body: str) -> Iterator[str]:
    """Each choice with what holds beside it, then what needs none."""
    pattern = lowered(body)
    for test in _terms(body):
        parts = in_tiles(pattern, test)
        if parts is not None:
            yield from (f"{choice.name}: {beside}" for choice, beside in parts.chosen)
            yield f"rest: {parts.rest}"


def tidy(body: str) -> Iterator[str]:
    return (str(shorter(test)) for test in _terms(body))


def overlap(body: str) -> Iterator[str]:
    """Of each two softmaxes."""
    overlaps = Overlaps()
    for left, right in combinations(lowered(body).softmaxes(), 2):
        may, certain = overlaps.of(left.terms[0].test, right.terms[0].test)
        found = "share a pair" if certain else "may share a pair" if may else "share no pair"
        yield f"{left.name} and {right.name} {found}"


def ranges(body: str) -> Iterator[str]:
    for test in _terms(body):
        for side, solved in (("keys", key_range), ("rows", row_range)):
            found = [solved(conjunct) for conjunct in conjuncts_of(test)]
            order = ordered(found)
            yield from (f"{side} {_range(found[i])}" for i in order or range(len(found)))
            if order is None:
                yield f"{side} in no order that a cursor can follow"


def split(body: str) -> Iterator[str]:
    pattern = taken_apart(lowered(body))
    yield from (branch(case.branch) for case in pattern.cases)
    for softmax in pattern.softmaxes():
        yield from tests(softmax)


def residues(body: str) -> Iterator[str]:
    for softmax in lowered(body).softmaxes():
        found = class_of(softmax)
        yield from ["no classes"] if found is None else [f"step {found[0]}", *tests(found[1])]


def listed(body: str) -> Iterator[str]:
    pattern = taken_apart(lowered(body))
    for softmax in pattern.softmaxes():
        for term in softmax.terms:
            found = walked(pattern, term)
            rest = f"walks {found[0].name}, masks {found[1]}" if found else "walks no choice"
            yield f"{softmax.name} {term.stream}: {rest}"


def selection(body: str) -> Iterator[str]:
    pattern = lowered(body)
    names = (found.name for found in pattern.inputs)
    for choice in (choice for choice in map(pattern.choice, names) if choice and choice.selected):
        found = choice_plan(pattern, choice)
        yield f"{choice.name} forced: {found.forced}"
        yield f"{choice.name} allowed: {found.allowed}"
        yield f"{choice.name} weights from entry {found.first} on: {found.weights}, {found.ratio} further each unit"


def read_lengths(body: str) -> Iterator[str]:
    pattern = lowered(body)
    return (f"{softmax.name}: {read_at(pattern, softmax)}" for softmax in pattern.softmaxes())


def joint(body: str) -> Iterator[str]:
    plan = plan_of(body)
    return (f"{found.name}: {', '.join(found.parts)}" for found in joints(plan.pattern, plan.softmaxes))


def partition(body: str) -> Iterator[str]:
    for softmax in _softmaxes(plan_of(body)):
        reads = "".join(f", reads {read.name}" for read in softmax.reads)
        yield from (f"{softmax.name} {sweep.stream.name}: {sweep.visit}{reads}" for sweep in softmax.sweeps)


def aligned(body: str) -> Iterator[str]:
    for softmax in _softmaxes(shortest(plan_of(body))):
        yield from (f"{softmax.name} {sweep.stream.name}: {sweep.test}" for sweep in softmax.sweeps)


def resident(body: str) -> Iterator[str]:
    found = still_seen(plan_of(body))
    yield f"the first {found[0]} and a window of {found[1]}" if found else "every token"


def divergence(body: str) -> Iterator[str]:
    plan = plan_of(body)
    plans = {softmax.name: softmax for softmax in plan.softmaxes}
    for kl in (extra for case in plan.pattern.cases for extra in case.extras if isinstance(extra, Kl)):
        sides = [plans[side.score.softmax.name] for side in (kl.target, kl.score)]
        held, kernels = list_of(kl, *sides), walked_by(kl, *sides)
        yield f"the list of {held.name} holds its entries" if held else "every entry is scored"
        yield "kernels walk its units" if kernels else "torch computes it"


def visible(body: str) -> Iterator[str]:
    """What the queries 0, 20 and 99 of 100 see."""
    for softmax in _softmaxes(plan_of(body)):
        for sweep in softmax.sweeps:
            try:
                seen = Visible(sweep.test, sweep.stream.grid.count(100))
            except DependsOnData:
                yield f"{softmax.name} {sweep.stream.name}: tensors tell"
                continue
            for q in (0, 20, 99):
                yield f"{softmax.name} {sweep.stream.name}, query {q}: {_keys(seen, q)}"


def count(body: str) -> Iterator[str]:
    """Pairs of 1,000 tokens and 4 heads, and the keys that a decode step reads."""
    plan = plan_of(body)
    counts = Count(plan, 1000, shape_of(plan.pattern, Shape(heads=4)))
    for softmax in plan.softmaxes:
        pairs, read = counts.pairs(softmax), counts.read(softmax).keys
        most = ["" if number.exact else "at most " for number in (pairs, read)]
        yield f"{softmax.name}: {most[0]}{pairs.value:,} pairs, a step reads {most[1]}{read.value:,} keys"


def _keys(seen: Visible, q: int) -> str:
    try:
        return ", ".join(f"{first} to {end - 1}" for first, end in seen.spans(q, 0, Trace())) or "none"
    except DependsOnData:
        keys = seen.keys(q)
        return " ".join(str(k) for k in range(keys.bit_length()) if keys >> k & 1)


def _terms(body: str) -> list[sympy.Basic]:
    return [term.test for softmax in lowered(body).softmaxes() for term in softmax.terms]


def _softmaxes(plan: Plan) -> list[SoftmaxPlan]:
    return [own for softmax in plan.softmaxes for own in (softmax, softmax.of_class) if own]


def _range(found: Range) -> str:
    full = "none" if found.full is sympy.false else f"[{found.full_first}, {found.full_end})"
    return f"[{found.first}, {found.end}), full {full}" + f" if {found.condition}" * (found.condition is not sympy.true)
