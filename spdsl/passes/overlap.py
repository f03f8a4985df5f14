"""overlap: whether two tests may share a (query, key) pair, decided conjunct by conjunct.

Each test is brought to its conjuncts once, however many others it is compared with.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product

from spdsl.budget import spend
from spdsl.ir.conjunct import Conjunct
from spdsl.ir.symbols import Boolean
from spdsl.passes.disjuncts import contradict, disjuncts

PAIR = 2  # steps of looking at two conjuncts of an atom each


@dataclass(slots=True)
class Overlaps:
    """The conjuncts of every test that was asked about."""

    known: dict[Boolean, tuple[Conjunct, ...]] = field(default_factory=dict)

    def of(self, left: Boolean, right: Boolean) -> tuple[bool, bool]:
        """Whether the two may share a pair, and whether that is certain."""
        shared = [both for both in product(self._conjuncts(left), self._conjuncts(right)) if not _apart(*both)]
        return bool(shared), any(not (conjunct.residual or conjunct.uniform) for conjunct in (a & b for a, b in shared))

    def _conjuncts(self, test: Boolean) -> tuple[Conjunct, ...]:
        if test not in self.known:
            self.known[test] = disjuncts(test)
        return self.known[test]


def _apart(left: Conjunct, right: Conjunct) -> bool:
    spend(PAIR * (1 + len(left.linears) * len(right.linears) // 4))
    return contradict(left, right)
