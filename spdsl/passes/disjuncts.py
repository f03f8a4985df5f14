"""disjuncts: an element test as a union of conjuncts, empty and redundant ones removed."""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations_with_replacement, product

import sympy
from sympy.core.relational import (
    Equality,
    GreaterThan,
    LessThan,
    Relational,
    StrictGreaterThan,
    StrictLessThan,
    Unequality,
)

from spdsl.budget import spend
from spdsl.ir.conjunct import Conjunct, Linear, Step
from spdsl.ir.symbols import Boolean, Expr, H, K, Q, lookups
from spdsl.limits import SET_CASES

ATOM, JOINED = 30, 5  # steps of bringing an atom to its form, most of which are known, and of an argument of And


class TooComplex(Exception):
    """The test has more than SET_CASES conjuncts."""


def disjuncts(test: Boolean) -> tuple[Conjunct, ...]:
    """The conjuncts whose union is `test`; none if it can never hold. Raises TooComplex."""
    kept: list[Conjunct] = []
    for candidate in _union(test):
        if _contradicts_itself(candidate):
            continue
        slim = _without_implied(candidate)
        spend(len(slim.linears) * sum(len(known.linears) for known in kept) // 2)
        if any(_implies(slim, known) for known in kept):
            continue
        kept = [known for known in kept if not _implies(known, slim)] + [slim]
    return tuple(kept)


def _union(test: Boolean) -> list[Conjunct]:
    if test is sympy.true:
        return [Conjunct()]
    if test is sympy.false:
        return []
    if isinstance(test, sympy.Or):
        return _capped([part for argument in _ordered(test) for part in _union(argument)])
    if isinstance(test, sympy.And):
        unions = [_union(argument) for argument in _ordered(test)]
        together = [Conjunct()]
        for union in unions:
            spend(sum(len(conjunct.linears) for conjunct in together) * len(union) // 4)
            together = _capped([left & right for left, right in product(together, union)])
        return together
    if isinstance(test, sympy.Not) and isinstance(test.args[0], sympy.logic.boolalg.BooleanFunction):
        return _union(sympy.to_nnf(test, simplify=False))
    spend(ATOM)
    return list(_atom(test))


def _ordered(junction: Boolean) -> list[Boolean]:
    return sorted(junction.args, key=sympy.default_sort_key)


def _capped(conjuncts: list[Conjunct]) -> list[Conjunct]:
    if len(conjuncts) > SET_CASES:
        raise TooComplex
    return conjuncts


@lru_cache(maxsize=4096)
def _atom(atom: Boolean) -> tuple[Conjunct, ...]:
    """One relation: linear ones are brought to `>= 0`, `!=` of a linear one splits in two."""
    if not isinstance(atom, Relational):
        return (_other_atom(atom),)
    less, greater = atom.rhs - atom.lhs, atom.lhs - atom.rhs
    sides = {  # (expression, strict): expression >= 0 or, strict, > 0
        LessThan: [[(less, False)]],
        StrictLessThan: [[(less, True)]],
        GreaterThan: [[(greater, False)]],
        StrictGreaterThan: [[(greater, True)]],
        Equality: [[(less, False), (greater, False)]],
        Unequality: [[(less, True)], [(greater, True)]],
    }[type(atom)]
    linear = [[_linear(expression, strict) for expression, strict in side] for side in sides]
    if any(linear_atom is None for side in linear for linear_atom in side):
        return (_other_atom(atom),)
    return tuple(Conjunct(linears=tuple(linear_atom for linear_atom in side if linear_atom)) for side in linear)


def _other_atom(atom: Boolean) -> Conjunct:
    if not atom.free_symbols & {Q, K}:
        return Conjunct(uniform=(atom,))
    return Conjunct(residual=(atom,))


def _linear(expression: Expr, strict: bool) -> Linear | None:
    """`expression >= 0` (`> 0` if strict) as a Linear, or None if it has another shape or no position at all."""
    expression = sympy.expand(expression)
    if lookups(expression) or expression.has(H):
        return None
    scale = sympy.ilcm(1, *(sympy.Rational(number).q for number in expression.as_coefficients_dict().values()))
    steps: dict[Expr, Step] = {}
    constant: Expr = sympy.S.Zero
    for term in sympy.Add.make_args(sympy.expand(expression * scale)):
        coefficient, rest = term.as_coeff_Mul()
        if not rest.free_symbols & {Q, K}:
            constant += term
            continue
        quotient = _step(rest, int(coefficient)) if coefficient.is_Integer else None
        if quotient is None or quotient[0] in steps:
            return None
        steps[quotient[0]] = quotient[1]
    if not steps:
        return None
    # Over integers, x > 0 is x - 1 >= 0: only once the fractions are scaled away.
    return _reduced(steps, constant - 1 if strict else constant)


def _reduced(steps: dict[Expr, Step], constant: Expr) -> Linear:
    """Without the common factor of the coefficients: 4k - 4q + 1023 >= 0 is k - q + 255 >= 0 over integers."""
    factor = int(sympy.igcd(*(step.coefficient for step in steps.values()), 0))
    if factor > 1 and constant.is_Integer:
        steps = {x: Step(step.coefficient // factor, step.unit, step.shift) for x, step in steps.items()}
        constant = sympy.floor(constant / factor)
    return Linear(steps.get(K), steps.get(Q), constant)


def _step(part: Expr, coefficient: int) -> tuple[Expr, Step] | None:
    if part in (K, Q):
        return part, Step(coefficient)
    if not isinstance(part, sympy.floor):
        return None
    inner, symbols = sympy.expand(part.args[0]), part.free_symbols
    if len(symbols) != 1:
        return None
    (x,) = symbols
    ratio = inner.coeff(x)
    if not (ratio.is_Rational and ratio.p == 1 and ratio.q > 1):
        return None
    # floor((x + r) / unit) with r rational is floor((x + floor(r)) / unit) for integer x
    shift = sympy.floor((inner - ratio * x) * ratio.q)
    return (x, Step(coefficient, int(ratio.q), int(shift))) if shift.is_Integer else None


def contradict(left: Conjunct, right: Conjunct) -> bool:
    """Whether the two, of which neither contradicts itself, never hold together, as `_contradicts_itself` tells."""
    others = dict.fromkeys((*left.uniform, *left.residual, *right.uniform, *right.residual))
    own = len(left.uniform) + len(left.residual), len(right.uniform) + len(right.residual)
    if len(others) > max(own):
        spend(JOINED * len(others))
        if sympy.And(*others) is sympy.false:
            return True
    numbers = (a.plus(b).number for a, b in product(left.linears, right.linears))
    return any(number is not None and bool(number < 0) for number in numbers)


def _contradicts_itself(conjunct: Conjunct) -> bool:
    """Two linears whose sum is a negative constant cannot both be >= 0; an atom and its negation neither."""
    others = (*conjunct.uniform, *conjunct.residual)
    spend(JOINED * len(others) + len(conjunct.linears) ** 2 // 4)
    if len(others) > 1 and sympy.And(*others) is sympy.false:
        return True
    numbers = (a.plus(b).number for a, b in combinations_with_replacement(conjunct.linears, 2))
    return any(number is not None and bool(number < 0) for number in numbers)


def _without_implied(conjunct: Conjunct) -> Conjunct:
    """Drops a linear that another one implies: e >= 0 follows from e - c >= 0, c >= 0; and k >= 0 always holds."""
    kept: list[Linear] = []
    for candidate in conjunct.linears:
        if candidate.is_nonnegative:
            continue
        if any(_at_least(candidate, known) for known in kept):
            continue
        kept = [known for known in kept if not _at_least(known, candidate)] + [candidate]
    return Conjunct(tuple(kept), conjunct.uniform, conjunct.residual)


def _at_least(weak: Linear, strong: Linear) -> bool:
    return weak.plus(strong, -1).is_nonnegative


def _implies(narrow: Conjunct, wide: Conjunct) -> bool:
    """True if every pair of `narrow` is a pair of `wide`, as far as atoms can be compared one by one."""
    return (
        set(wide.uniform) <= set(narrow.uniform)
        and set(wide.residual) <= set(narrow.residual)
        and all(any(_at_least(weak, strong) for strong in narrow.linears) for weak in wide.linears)
    )
