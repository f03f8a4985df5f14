"""tidy: an element test without repetitions, what all of its cases share in front."""

from __future__ import annotations

import sympy
from sympy.core.relational import Relational

from spdsl.ir.compared import Compared
from spdsl.ir.conjunct import Conjunct
from spdsl.ir.symbols import Boolean
from spdsl.passes.disjuncts import disjuncts


def tidy(test: Boolean) -> Boolean:
    """An equal test, in its least numbers and no longer than `test`, or `test` itself."""
    conjuncts = disjuncts(test)
    atoms = [_atoms(conjunct) for conjunct in conjuncts]
    shared = [atom for atom in atoms[0] if all(atom in others for others in atoms)]
    cases = [sympy.And(*(atom for atom in case if atom not in shared)) for case in atoms]
    shorter = sympy.And(*shared, sympy.Or(*cases))
    return shorter if _size(shorter) <= _size(test) else test


def _atoms(conjunct: Conjunct) -> list[Boolean]:
    return [*(linear.total() >= 0 for linear in conjunct.linears), *conjunct.uniform, *conjunct.residual]


def _size(test: Boolean) -> int:
    """How many relations stand in the text, repetitions counted."""
    return sum(isinstance(part, Relational | Compared) for part in sympy.preorder_traversal(test))
