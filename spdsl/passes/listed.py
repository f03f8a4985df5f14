"""listed: which choice a softmax walks as a list of units, query by query.

A term whose every pair lies in a unit of a list needs no map of its choice: the kernel visits the units that the list
names. What is left of the test masks elements.
"""

from __future__ import annotations

import sympy

from spdsl.ir.pattern import Choice, Pattern, Term
from spdsl.ir.symbols import Boolean, is_membership, lookup_name, lookups


def listed(pattern: Pattern, term: Term) -> tuple[Choice, Boolean] | None:
    """The choice whose units hold every pair of `term`, and the rest of its test; None if there is none.

    The choice must be listed: one that is selected for tiles of rows has a list per query, too.
    """
    for read in lookups(term.test):
        choice = pattern.choice(lookup_name(read)) if is_membership(read) else None
        if choice is None or not choice.listed:
            continue
        member = sympy.Ne(read, 0)
        if term.test.xreplace({member: sympy.false}) is not sympy.false:
            continue
        rest = term.test.xreplace({member: sympy.true})
        if read not in rest.atoms(type(read)):
            return choice, rest
    return None
