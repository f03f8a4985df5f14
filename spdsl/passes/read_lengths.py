"""read_lengths: at which lengths some result that answers reads a softmax; at others its kernels have nothing to do."""

from __future__ import annotations

import sympy

from spdsl.ir.pattern import Pattern, Phase, Softmax
from spdsl.ir.symbols import Boolean, lookups


def read_lengths(pattern: Pattern, softmax: Softmax) -> Boolean:
    """A condition on `length`. One that reads tensors may hold or not; and a choice is made whatever answers."""
    if softmax.name in pattern.probabilities():
        return sympy.true
    return sympy.Or(*(_in_phase(pattern, softmax, phase) for phase in Phase))


def _in_phase(pattern: Pattern, softmax: Softmax, phase: Phase) -> Boolean:
    read, earlier = sympy.false, sympy.false
    for case in pattern.cases_of(phase):
        condition = sympy.true if case.condition is None else case.condition
        known = not lookups(condition)
        if softmax in pattern.steps(case):
            read = sympy.Or(read, sympy.And(condition if known else sympy.true, sympy.Not(earlier)))
        if known:
            earlier = sympy.Or(earlier, condition)
    return read
