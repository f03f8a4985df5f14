"""Tests in the coordinates of a residue class mean what they mean in positions."""

from __future__ import annotations

import pytest
import sympy

from spdsl.ir.pattern import Softmax
from spdsl.ir.symbols import Boolean, K, Q
from spdsl.passes.residues import residues
from tests.passes.lowered import lowered

TOKENS = 48
SETS = [
    "dilated(6, 3)",
    "dilated(6, 3) - strided(2)",
    "dilated(6, 4) - strided(5)",
    "dilated(6, 2) & where((q - k) % 4 == 0)",
    "dilated(6, 4) & where((q - k) % 6 < 3)",
    "strided(3) & sliding(17)",
    "strided(2) - strided(3)",
]


def softmax_of(keys: str) -> Softmax:
    (found,) = lowered(f"causal return attend({keys})").softmaxes()
    return found


def holds(test: Boolean, q: int, k: int) -> bool:
    return bool(test.xreplace({Q: sympy.Integer(q), K: sympy.Integer(k)}))


@pytest.mark.parametrize("keys", SETS)
def test_a_class_sees_what_its_positions_see(keys: str) -> None:
    softmax = softmax_of(keys)
    found = residues(softmax)
    assert found is not None
    step, of_class = found
    (test,), (own,) = ([term.test for term in one.terms] for one in (softmax, of_class))
    for q in range(TOKENS):
        for k in range(q + 1):
            seen = (q - k) % step == 0 and holds(own, q // step, k // step)
            assert seen == holds(test, q, k), (q, k)


def test_a_class_that_sees_nothing_is_no_class() -> None:
    assert residues(softmax_of("dilated(6, 4) & where((q - k) % 8 == 3)")) is None
