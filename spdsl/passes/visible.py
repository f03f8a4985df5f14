"""visible: the keys that one query sees, found from the element test alone.

A conjunct of linear atoms is one span of keys; further atoms keep those of its keys whose position repeats with a
period. What is neither is listed key by key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from math import lcm

import sympy

from spdsl.budget import spend
from spdsl.ir.conjunct import Conjunct, Linear
from spdsl.ir.symbols import LENGTH, Boolean, H, K, Q, lookups
from spdsl.passes.disjuncts import TooComplex, disjuncts
from spdsl.passes.numbers import NotWhole, compiled
from spdsl.passes.series import EVALUATION, Trace
from spdsl.passes.spans import Spans, size, union

Residual = Callable[[int, int, int], int]  # (q, head, length) -> bits


MOST_LISTED = 4096  # keys of a test that has to be looked at pair by pair: above it nothing is counted
MOST_PERIOD = 65536  # positions after which a test repeats: above it, it is one that does not
_BITS = 4096  # of a number that are worked on in the time of an evaluation


class DependsOnData(Exception):
    """Only the values of tensors, or the scores, tell; or a walk over more pairs than is worth it."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A conjunct: its linear atoms, and the others with the number of positions after which they repeat."""

    conjunct: Conjunct
    residuals: tuple[Residual, ...]
    period: int | None  # None: they do not repeat


class Visible:
    """The keys of a sequence of `length` that `test` lets a query see. Raises DependsOnData."""

    def __init__(self, test: Boolean, length: int) -> None:
        test = test.xreplace({LENGTH: sympy.Integer(length)})
        if lookups(test):
            raise DependsOnData
        try:
            self._parts = [_part(conjunct) for conjunct in disjuncts(test)]
        except TooComplex:
            raise DependsOnData from None
        self.length = length
        self._holds = cache(_holds)
        self._places = cache(self._classes)
        self.by_head = H in test.free_symbols

    def keys(self, q: int, head: int = 0) -> int:
        """What the query at position q sees: bit k of the number stands for key k."""
        spend(EVALUATION * (1 + self.length // _BITS))
        every = 0
        for part in self._of(head):
            if part.residuals and part.period is None and self.length > MOST_LISTED:
                raise DependsOnData
            seen = bits(*_span(part.conjunct.linears, q, self.length, Trace()))
            for residual in part.residuals:
                seen &= residual(q, head, self.length)
            every |= seen
        return every

    def spans(self, q: int, head: int, trace: Trace) -> Spans:
        """The same as spans. Raises DependsOnData where a key is left out by its number alone."""
        parts = self._of(head)
        if any(part.residuals for part in parts):
            raise DependsOnData
        return union((_span(part.conjunct.linears, q, self.length, trace) for part in parts), trace)

    def size(self, q: int, head: int, trace: Trace) -> int:
        """How many keys the query sees."""
        parts = self._of(head)
        if not any(part.residuals for part in parts):
            return size(self.spans(q, head, trace))
        if any(part.period is None for part in parts):
            return self.keys(trace.constant(q), head).bit_count()  # no stretch of queries is alike
        period = _common(part.period for part in parts)
        if period is None:
            raise DependsOnData
        spans = [_span(part.conjunct.linears, q, self.length, trace) for part in parts]
        remainder = trace.remainder(q, period)
        every = [span for part, span in zip(parts, spans, strict=True) if not part.residuals]
        plain = union(every, trace)
        number = size(plain)
        for place, chosen in self._places(remainder, head, period):
            spend(EVALUATION)
            own = [_of_class(spans[i], place, period, trace) for i in chosen]
            own += [_of_class(span, place, period, trace) for span in every]
            known = [_of_class(span, place, period, trace) for span in plain]
            number += size(union(own, trace)) - size(union(known, trace))
        return number

    def units(self) -> Iterator[int]:
        """What positions of queries are divided by, and periods."""
        for part in self._parts:
            yield part.period or 1
            for linear in part.conjunct.linears:
                yield linear.q.unit if linear.q else 1
                if linear.k is not None and linear.q is not None:
                    yield abs(linear.k.coefficient) * linear.q.unit

    def signature(self, head: int) -> tuple[bool, ...]:
        """Heads of one signature see the same; heads that atoms of other shapes read have one of their own."""
        own = any(H in atom.free_symbols for part in self._parts for atom in part.conjunct.residual)
        holding = tuple(self._holds(part.conjunct, head) for part in self._parts)
        return (*holding, *(bool(head >> i & 1) for i in range(16))) if own else holding

    def _of(self, head: int) -> list[_Part]:
        return [part for part in self._parts if self._holds(part.conjunct, head)]

    def _classes(self, q: int, head: int, period: int) -> list[tuple[int, list[int]]]:
        """For each remainder of k that some conjunct of several atoms lets pass, those conjuncts by their numbers."""
        passes: dict[int, list[int]] = {}
        for i, part in enumerate(self._of(head)):
            if part.residuals:
                seen = bits(0, period)
                for residual in part.residuals:
                    seen &= residual(q, head, period)
                for place in _members(seen):
                    passes.setdefault(place, []).append(i)
        return list(passes.items())


def bits(first: int, end: int) -> int:
    """Those of [first, end)."""
    return ((1 << end) - (1 << first)) if end > first else 0


def _members(bits_left: int) -> Iterator[int]:
    while bits_left:
        low = bits_left & -bits_left
        yield low.bit_length() - 1
        bits_left ^= low


def _part(conjunct: Conjunct) -> _Part:
    residuals = tuple(_residual(atom) for atom in conjunct.residual)
    return _Part(conjunct, residuals, _common(_period(atom) for atom in conjunct.residual))


def _holds(conjunct: Conjunct, head: int) -> bool:
    return all(bool(atom.xreplace({H: sympy.Integer(head)})) for atom in conjunct.uniform)


def _of_class(span: tuple[int, int], place: int, period: int, trace: Trace) -> tuple[int, int]:
    """The members of a span with remainder `place`, numbered."""
    return trace.ceil(span[0] - place, period), trace.ceil(span[1] - place, period)


def _span(linears: tuple[Linear, ...], q: int, length: int, trace: Trace) -> tuple[int, int]:
    """The k for which every linear is >= 0: each solved for k, as in `ranges`, with numbers."""
    first, end = 0, length
    for linear in linears:
        rest = int(linear.constant)
        if linear.q:
            rest += linear.q.coefficient * trace.floor(q + linear.q.shift, linear.q.unit)
        k = linear.k
        if k is None:
            end = 0 if trace.less(rest, 0) else end
        elif k.coefficient > 0:
            first = trace.most(first, -trace.floor(rest, k.coefficient) * k.unit - k.shift)
        else:
            end = trace.least(end, (trace.floor(rest, -k.coefficient) + 1) * k.unit - k.shift)
    return first, trace.most(first, end)


def _residual(atom: Boolean) -> Residual:
    """The keys for which an atom of another shape holds; one whose positions stand in remainders only repeats."""
    period, listed = _period(atom), _lister(atom)
    by_head, known = H in atom.free_symbols, dict[tuple[int, int], int]()

    def repeated(q: int, head: int, length: int) -> int:
        assert period is not None
        place = (q % period, head if by_head else 0)
        if place not in known:
            known[place] = listed(*place, period)
        return _tiled(known[place], period, length)

    return listed if period is None else repeated


def _period(atom: Boolean) -> int | None:
    """After how many positions an atom repeats along q and k; None if it does not, or after too many."""
    remainders = [remainder for remainder in atom.atoms(sympy.Mod) if remainder.free_symbols & {Q, K}]
    if atom.xreplace({remainder: sympy.Dummy() for remainder in remainders}).free_symbols & {Q, K}:
        return None
    whole = all(_steps(remainder.args[0]) and remainder.args[1].is_Integer for remainder in remainders)
    return _common(int(remainder.args[1]) for remainder in remainders) if whole else None


def _common(periods: Iterable[int | None]) -> int | None:
    """After how many positions all of them repeat; None if one does not, or after more than MOST_PERIOD."""
    whole = 1
    for period in periods:
        if period is None or (whole := lcm(whole, period)) > MOST_PERIOD:
            return None
    return whole


def _steps(inner: sympy.Expr) -> bool:
    """Whether each step of q and of k adds a whole number."""
    rest = sympy.expand(inner - inner.coeff(Q) * Q - inner.coeff(K) * K)
    return bool(inner.coeff(Q).is_Integer and inner.coeff(K).is_Integer and not rest.free_symbols & {Q, K})


def _lister(atom: Boolean) -> Residual:
    """The first `length` keys for which an atom holds, as bits."""
    try:
        test = compiled(atom)
    except NotWhole:
        raise DependsOnData from None

    def listed(q: int, head: int, length: int) -> int:
        spend(length // 2)  # a test of a pair is a fraction of an evaluation
        return sum(1 << k for k in range(length) if test({Q: q, H: head, K: k}, Trace()))

    return listed


def _tiled(pattern: int, period: int, length: int) -> int:
    width = period
    while width < length:
        pattern |= pattern << width
        width *= 2
    return pattern & bits(0, length)
