"""partition: each term of each softmax as a sweep, in the loop form that its conjuncts allow."""

from __future__ import annotations

from dataclasses import replace

import sympy

from spdsl.budget import spend, working_on
from spdsl.diagnostics import Source
from spdsl.ir import interval
from spdsl.ir.conjunct import Conjunct
from spdsl.ir.pattern import Choice, Pattern, Softmax, Stream, Tensor, Term
from spdsl.ir.plan import Plan, Role, SoftmaxPlan, Sweep
from spdsl.ir.symbols import LENGTH, Q_FIRST, Q_LAST, Boolean, Expr, Q, lookup_name, lookups
from spdsl.ir.visit import Order, Range, Ranges, TileMap, Units
from spdsl.passes.bias_reads import with_bias_reads
from spdsl.passes.disjuncts import disjuncts
from spdsl.passes.joint import joints
from spdsl.passes.listed import listed
from spdsl.passes.ranges import extremum, key_range, ordered, row_range
from spdsl.passes.read_lengths import read_lengths
from spdsl.passes.residues import residues
from spdsl.passes.selection import selection

HULL = 10  # steps of comparing two ends


def partition(pattern: Pattern, source: Source) -> Plan:
    """The plan of a checked pattern."""
    softmaxes = with_bias_reads(pattern, [_softmax(pattern, softmax, source) for softmax in pattern.softmaxes()])
    choices = [step for case in pattern.cases for step in pattern.steps(case) if isinstance(step, Choice)]
    selected = tuple(selection(pattern, choice) for choice in dict.fromkeys(choices) if choice.selected)
    return Plan(pattern, softmaxes, selected, joints(pattern, softmaxes))


def _softmax(pattern: Pattern, softmax: Softmax, source: Source) -> SoftmaxPlan:
    working_on(softmax.span)
    plan = replace(
        _sweeps(pattern, softmax, source), role=_role(pattern, softmax), wanted=read_lengths(pattern, softmax)
    )
    plain = plan.role is Role.BRANCH and plan.units is None and softmax.skip is None  # a skip goes by position
    found = residues(softmax) if plain else None
    if found is None:
        return plan
    step, of_class = found
    return replace(plan, step=step, of_class=_sweeps(pattern, of_class, source))


def _role(pattern: Pattern, softmax: Softmax) -> Role:
    if any(softmax.name in pattern.outputs(case) for case in pattern.cases):
        return Role.BRANCH
    return Role.LSE if softmax.name in pattern.probabilities() else Role.LOGITS


def _sweeps(pattern: Pattern, softmax: Softmax, source: Source) -> SoftmaxPlan:
    walked = listed(pattern, softmax.terms[0]) if len(softmax.terms) == 1 else None
    if walked:
        sweeps: tuple[Sweep, ...] = (_units(pattern, softmax.terms[0], *walked, source),)
    else:
        sweeps = tuple(_sweep(pattern, term, source) for term in softmax.terms)
    read = [name for sweep in sweeps for name in map(lookup_name, lookups(sweep.test))]
    for number in (softmax.bias, softmax.skip and softmax.skip.level):
        read += [] if number is None else map(lookup_name, lookups(number))
    inputs = tuple(pattern.input(name) for name in dict.fromkeys(read))
    reads = tuple(found for found in inputs if isinstance(found, Tensor | Choice))
    return SoftmaxPlan(softmax, sweeps, reads)


def _units(pattern: Pattern, term: Term, choice: Choice, rest: Boolean, source: Source) -> Sweep:
    """The sweep over the units of a list: `rest` masks elements.

    Where each head has a list of its own, a tile of 16 rows or more has as many queries, whose union is far larger than
    a list; the parts of outputs that keys outermost leave are as many as the pairs of a query and a unit.
    """
    stream = pattern.input(term.stream)
    assert isinstance(stream, Stream)
    apart = choice.share == "head" and choice.rows == 1 and choice.capacity is not None and not choice.gathered
    visit = Units(choice, Order.KEYS if apart else Order.ROWS)
    return Sweep(stream, rest, visit, (), _line(term, source))


def _line(term: Term, source: Source) -> int:
    return source.position(term.span.start)[0] if term.span else 0


def _sweep(pattern: Pattern, term: Term, source: Source) -> Sweep:
    conjuncts = disjuncts(term.test)
    stream = pattern.input(term.stream)
    assert isinstance(stream, Stream)
    line = _line(term, source)
    keys = _in_order([key_range(conjunct) for conjunct in conjuncts])
    rows = _in_order([row_range(conjunct) for conjunct in conjuncts])
    decode = _decode_ranges(conjuncts)
    if keys is None or rows is None or any(_reads_positions(conjunct) for conjunct in conjuncts):
        return Sweep(stream, term.test, TileMap(interval.may(term.test), interval.must(term.test)), decode, line)
    return Sweep(stream, term.test, Ranges(keys, rows), decode, line)


def _reads_positions(conjunct: Conjunct) -> bool:
    """A tensor read at a position thins out the ranges in a way that only the tensor's values tell."""
    return any(lookups(atom) for atom in conjunct.residual)


def _in_order(ranges: list[Range]) -> tuple[Range, ...] | None:
    order = ordered(ranges)
    return None if order is None else tuple(ranges[i] for i in order)


def _decode_ranges(conjuncts: tuple[Conjunct, ...]) -> tuple[Range, ...]:
    """Ranges of one query for any head: conditions on heads and tensors are left to the element mask."""
    single = {Q_FIRST: Q, Q_LAST: Q}
    ranges = [_at(key_range(Conjunct(linears=conjunct.linears)), single) for conjunct in conjuncts]
    distinct = list(dict.fromkeys(ranges))
    in_order = _in_order(distinct)
    return in_order if in_order is not None else (_hull(distinct),)


def _at(found: Range, corners: dict[sympy.Symbol, sympy.Symbol]) -> Range:
    first, full_first = (_ends_at(sympy.Max, end, corners) for end in (found.first, found.full_first))
    end, full_end = (_ends_at(sympy.Min, end, corners) for end in (found.end, found.full_end))
    condition, full = (test.xreplace(corners) for test in (found.condition, found.full))
    return Range(first, end, condition, full_first, full_end, full)


def _ends_at(kind: type[sympy.Max | sympy.Min], end: Expr, corners: dict[sympy.Symbol, sympy.Symbol]) -> Expr:
    return extremum(kind, [part.xreplace(corners) for part in _parts(kind, end)])


def _parts(kind: type[sympy.Max | sympy.Min], value: Expr) -> tuple[Expr, ...]:
    return value.args if isinstance(value, kind) else (value,)


def _hull(ranges: list[Range]) -> Range:
    """One range over all: right with the element mask, if longer than the union."""
    spend(HULL * len(ranges) ** 2)
    first = _together(sympy.Min, sympy.Max, [found.first for found in ranges])
    end = extremum(sympy.Min, [LENGTH, *_parts(sympy.Min, _together(sympy.Max, sympy.Min, [r.end for r in ranges]))])
    return Range(first, end, sympy.true, first, first, sympy.false)


def _together(outer: type[sympy.Max | sympy.Min], inner: type[sympy.Max | sympy.Min], values: list[Expr]) -> Expr:
    """The `outer` of values, which are an `inner` each: what all of these share stands in front."""
    parts = [_parts(inner, value) for value in values]
    shared = [part for part in parts[0] if all(part in others for others in parts)]
    rest = [[part for part in own if part not in shared] for own in parts]
    if not all(rest):
        return extremum(inner, shared)
    return extremum(inner, [*shared, extremum(outer, [extremum(inner, own) for own in rest])])
