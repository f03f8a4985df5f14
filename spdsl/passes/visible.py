"""visible: the keys that one query sees, found from the element test alone. Bit k of a number stands for key k."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import lcm

import sympy

from spdsl.ir.conjunct import Conjunct, Linear
from spdsl.ir.symbols import LENGTH, Boolean, H, K, Q, lookups
from spdsl.passes.disjuncts import TooComplex, disjuncts

Residual = Callable[[int, int, int], int]  # (q, head, length) -> bits


class DependsOnData(Exception):
    """Only the values of tensors, or the scores, tell."""


class Visible:
    """The keys of a sequence of `length` that `test` lets a query see. Raises DependsOnData."""

    def __init__(self, test: Boolean, length: int) -> None:
        test = test.xreplace({LENGTH: sympy.Integer(length)})
        if lookups(test):
            raise DependsOnData
        try:
            self._conjuncts = [(conjunct, [_residual(atom) for atom in conjunct.residual])
                               for conjunct in disjuncts(test)]  # fmt: skip
        except TooComplex:
            raise DependsOnData from None
        self.length = length
        self._holds = cache(_holds)
        self.by_head = H in test.free_symbols

    def keys(self, q: int, head: int = 0) -> int:
        """What the query at position q sees, as bits."""
        found = 0
        for conjunct, residuals in self._conjuncts:
            if not self._holds(conjunct, head):
                continue
            seen = _interval(conjunct.linears, q, self.length)
            for residual in residuals:
                seen &= residual(q, head, self.length)
            found |= seen
        return found


def bits(first: int, end: int) -> int:
    """Those of [first, end)."""
    return ((1 << end) - (1 << first)) if end > first else 0


def _holds(conjunct: Conjunct, head: int) -> bool:
    return all(bool(atom.xreplace({H: sympy.Integer(head)})) for atom in conjunct.uniform)


def _interval(linears: tuple[Linear, ...], q: int, length: int) -> int:
    """The k for which every linear is >= 0: each solved for k, as in `ranges`, with numbers."""
    first, end = 0, length
    for linear in linears:
        rest = int(linear.constant)
        if linear.q:
            rest += linear.q.coefficient * ((q + linear.q.shift) // linear.q.unit)
        k = linear.k
        if k is None:
            end = end if rest >= 0 else 0
        elif k.coefficient > 0:
            first = max(first, -(rest // k.coefficient) * k.unit - k.shift)
        else:
            end = min(end, (rest // -k.coefficient + 1) * k.unit - k.shift)
    return bits(first, end)


def _residual(atom: Boolean) -> Residual:
    """The keys for which an atom of another shape holds; one whose positions stand in remainders only repeats."""
    period = _period(atom)
    by_head, known = H in atom.free_symbols, dict[tuple[int, int], int]()

    def repeated(q: int, head: int, length: int) -> int:
        assert period is not None
        place = (q % period, head if by_head else 0)
        if place not in known:
            known[place] = _tiled(_listed(atom, *place, range(min(period, length))), period, length)
        return known[place]

    def listed(q: int, head: int, length: int) -> int:
        return _listed(atom, q, head, range(length))

    return listed if period is None else repeated


def _period(atom: Boolean) -> int | None:
    """After how many positions an atom repeats along q and k; None if it does not."""
    remainders = [found for found in atom.atoms(sympy.Mod) if found.free_symbols & {Q, K}]
    if atom.xreplace({found: sympy.Dummy() for found in remainders}).free_symbols & {Q, K}:
        return None
    whole = all(_steps(found.args[0]) and found.args[1].is_Integer for found in remainders)
    return lcm(*(int(found.args[1]) for found in remainders)) if whole else None


def _steps(inner: sympy.Expr) -> bool:
    """Whether each step of q and of k adds a whole number."""
    rest = sympy.expand(inner - inner.coeff(Q) * Q - inner.coeff(K) * K)
    return bool(inner.coeff(Q).is_Integer and inner.coeff(K).is_Integer and not rest.free_symbols & {Q, K})


def _listed(atom: Boolean, q: int, head: int, keys: range) -> int:
    own = atom.xreplace({Q: sympy.Integer(q), H: sympy.Integer(head)})
    return sum(1 << k for k in keys if own.xreplace({K: sympy.Integer(k)}) == sympy.true)


def _tiled(pattern: int, period: int, length: int) -> int:
    width = period
    while width < length:
        pattern |= pattern << width
        width *= 2
    return pattern & bits(0, length)
