"""residues: a softmax whose keys all lie at distances that are multiples of one step, in coordinates of one class.

Tokens of one residue class only see each other. With q = step * i + r and k = step * j + r the test loses its
remainder, so that a dilated window becomes a plain window over each class and no tile is visited for a few pairs in it.
"""

from __future__ import annotations

from dataclasses import replace

import sympy

from spdsl.ir.conjunct import Conjunct
from spdsl.ir.pattern import Softmax, Term
from spdsl.ir.symbols import LENGTH, Boolean, Expr, K, Q, lookups
from spdsl.passes.disjuncts import disjuncts


def residues(softmax: Softmax) -> tuple[int, Softmax] | None:
    """(step, the softmax over one class), or None if its sets do not fall into classes."""
    steps = {_step(conjunct) for term in softmax.terms for conjunct in disjuncts(term.test)}
    step = steps.pop() if len(steps) == 1 else None
    if step is None:
        return None
    terms = [_of_class(term.test, step) for term in softmax.terms]
    bias = softmax.bias if softmax.bias is None else _of_class(softmax.bias, step)
    if any(test in (None, sympy.false) for test in terms) or (softmax.bias is not None and bias is None):
        return None
    placed = tuple(Term(term.stream, test, term.span) for term, test in zip(softmax.terms, terms, strict=True))
    return step, replace(softmax, name=f"{softmax.name}_class", terms=placed, bias=bias)


def _step(conjunct: Conjunct) -> int | None:
    """The step of a conjunct: of its one atom `(q - k) % step == 0`."""
    for atom in conjunct.residual:
        if isinstance(atom, sympy.Eq) and isinstance(atom.lhs, sympy.Mod) and atom.rhs == 0:
            distance, step = atom.lhs.args
            if distance in (Q - K, K - Q) and step.is_Integer and step > 1:
                return int(step)
    return None


def _of_class(value: Expr | Boolean, step: int) -> Expr | Boolean | None:
    """The value in class coordinates; None if it knows more than the distance q - k."""
    if LENGTH in value.free_symbols or any(read.free_symbols & {Q, K} for read in lookups(value)):
        return None
    remainder = sympy.Symbol("remainder", integer=True, nonnegative=True)
    moved = value.xreplace({Q: step * Q + remainder, K: step * K + remainder})
    moved = moved.replace(
        lambda part: isinstance(part, sympy.Mod), lambda part: sympy.Mod(sympy.expand(part.args[0]), part.args[1])
    )
    moved = moved.replace(
        lambda part: isinstance(part, sympy.core.relational.Relational),
        lambda part: part.func(sympy.expand(part.lhs - part.rhs), 0),
    )
    moved = sympy.expand(moved) if isinstance(moved, sympy.Expr) else moved
    return None if remainder in moved.free_symbols else moved
