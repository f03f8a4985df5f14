"""later_keys: a query and a later key that a result is sure to show it, whatever tensors and lists hold.

Pairs are tried at the corners of the solved ranges, and a pair counts only if the whole test is true at it. What cannot
be proved that way is taken for meant.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice, product

import sympy

from spdsl.budget import spend
from spdsl.ir.compared import rooted
from spdsl.ir.conjunct import Conjunct
from spdsl.ir.pattern import Case, Choice, Grid, Pattern, Softmax, Stream, Term
from spdsl.ir.rule import Drawn
from spdsl.ir.symbols import LENGTH, Q_FIRST, Q_LAST, Boolean, H, K, Q, is_membership, lookup_name, lookups
from spdsl.passes.disjuncts import TooComplex, disjuncts
from spdsl.passes.ranges import key_range
from spdsl.primitives.attend import closed

MOST_SETS = 16  # of one result that are looked at
MOST_NODES = 10_000  # of expressions that are evaluated for one result; the likely places are among the first
NODE = 1  # steps
FAR = 2**30  # a length at which no key is too far away
MOST_HEADS = 16  # that are tried
HEADS = 2  # any model has so many; where the pattern declares no number, a set of another head may be nobody's


@dataclass(frozen=True, slots=True)
class Place:
    """A query, an entry of a stream, and the length of their sequence."""

    q: int
    k: int
    length: int


@dataclass(frozen=True, slots=True)
class Seen:
    """What a softmax shows at a place: an entry of `stream` that holds a later token."""

    softmax: Softmax
    stream: Stream
    place: Place


def later_key(pattern: Pattern, case: Case) -> Seen | None:
    """The first later key that a result surely shows, if there is one."""
    outputs = pattern.outputs(case)
    steps = [step for step in pattern.steps(case) if isinstance(step, Softmax) and step.name in outputs]
    sets = [(softmax, term, _stream(pattern, term)) for softmax in steps for term in softmax.terms]
    sets = [own_set for own_set in sets if not rooted(own_set[1].test)][:MOST_SETS]  # of a number below 0 it is none
    left = MOST_NODES
    for softmax, term, stream in sets:
        later = sympy.Not(closed(stream, causal=True))
        if case.condition is not None:
            later = sympy.And(later, case.condition)
        shown = sympy.Or(*(other.test for _, other, other_stream in sets if other_stream.grid == stream.grid))
        whole, own = sympy.And(shown, later), sympy.And(term.test, later)
        nodes = sum(1 for _ in sympy.preorder_traversal(whole))
        for place in islice(_places(own, stream.grid), 1 + max(left, 0) // nodes):
            left -= nodes
            spend(NODE * nodes)
            if _certain(pattern, whole, place):
                return Seen(softmax, stream, place)
    return None


def _stream(pattern: Pattern, term: Term) -> Stream:
    stream = pattern.input(term.stream)
    assert isinstance(stream, Stream)
    return stream


def _places(test: Boolean, grid: Grid) -> Iterator[Place]:
    """Where the test may hold: the begin of a long sequence first, then the corners of the ranges."""
    numbers = _numbers(test) | {1, grid.width}
    long = 2 * sum(numbers) + 2
    yield Place(0, 1, long)
    try:
        conjuncts = disjuncts(test)
    except TooComplex:
        return
    near = [0, *sorted({number + step for number in numbers for step in (-1, 0, 1)} - {-1, 0})]
    yield from chain.from_iterable(_corners(conjunct, grid, [long, FAR, *near[1:]], near) for conjunct in conjuncts)


def _numbers(test: Boolean) -> set[int]:
    written = test.atoms(sympy.Rational)
    return {abs(int(part)) for number in written for part in (number.p, number.q)}


def _corners(conjunct: Conjunct, grid: Grid, lengths: list[int], near: list[int]) -> Iterator[Place]:
    """The queries `near` and, from the first entry that the linear atoms leave them, those at such distances."""
    visited = key_range(Conjunct(conjunct.linears))
    for q, length in product(near, lengths):
        at = {Q_FIRST: sympy.Integer(q), Q_LAST: sympy.Integer(q), LENGTH: sympy.Integer(length)}
        first, end = visited.first.xreplace(at), visited.end.xreplace(at)
        if q < length and first.is_Integer and end.is_Integer:
            keys = (int(first) + step for step in near)
            yield from (Place(q, k, length) for k in keys if k < min(int(end), grid.count(length)))


def _certain(pattern: Pattern, test: Boolean, place: Place) -> bool:
    """Whether the test is true at a place for some head."""
    at = {Q: sympy.Integer(place.q), K: sympy.Integer(place.k), LENGTH: sympy.Integer(place.length)}
    shown = test.xreplace(_whole(pattern, test, place.length)).xreplace(at)
    heads = _heads(shown, pattern.query_heads or HEADS) if H in shown.free_symbols else [0]
    return any(shown.xreplace({H: sympy.Integer(h)}) is sympy.true for h in heads)


def _heads(test: Boolean, count: int) -> list[int]:
    """The first and last heads, and those at and beside the numbers of the test."""
    near = {number + step for number in _numbers(test) for step in (-1, 0, 1)}
    return sorted(h for h in {0, 1, count - 1} | near if 0 <= h < count)[:MOST_HEADS]


def _whole(pattern: Pattern, test: Boolean, length: int) -> dict[sympy.Expr, sympy.Expr]:
    """The reads of choices that surely take every unit of a sequence."""
    reads = {read: pattern.choice(lookup_name(read)) for read in lookups(test) if is_membership(read)}
    return {read: sympy.S.One for read, choice in reads.items() if choice and _takes_all(pattern, choice, length)}


def _takes_all(pattern: Pattern, choice: Choice, length: int) -> bool:
    """Whether there is room for more than the units of a sequence, and a score for each."""
    if length % choice.unit or length > (choice.count or 0) * choice.unit:
        return False
    if isinstance(choice.rule, Drawn):
        return True
    if choice.score is None or choice.within is not sympy.true:
        return False
    (term,) = choice.score.softmax.terms
    grid = _stream(pattern, term).grid
    return term.test is sympy.true and grid.before == 0 and grid.width <= choice.unit
