"""At which lengths a softmax is read."""

from __future__ import annotations

import pytest
import sympy

from spdsl.ir.symbols import LENGTH
from tests.cost.plans import plan_of_text

NEAR, FAR = "attend(sliding(16))", "attend(sink(4))"


def answers(body: str, lengths: tuple[int, ...]) -> dict[str, list[bool]]:
    """Of each softmax, whether its kernels have something to do at these lengths."""
    plan = plan_of_text(f"pattern p {{ causal {body} }}")
    return {
        one.name: [one.wanted.xreplace({LENGTH: sympy.Integer(at)}) is sympy.true for at in lengths]
        for one in plan.softmaxes
    }


@pytest.mark.parametrize(
    "body, wanted",
    [
        (f"return {NEAR}", [[True] * 3]),
        (f"return {NEAR} if length < 20 return {FAR}", [[True, False, False], [False, True, True]]),
        # the third result answers where neither of the others does
        (
            f"return {NEAR} if length < 20 return {FAR} if length < 30 return attend(all)",
            [[True, False, False], [False, True, False], [False, False, True]],
        ),
        # in some phase the second result answers always
        (f"return {NEAR} if (length < 20) & prefill return {FAR}", [[True, False, False], [True] * 3]),
        # a scalar decides: either may be read
        (f"s = tensor() return {NEAR} if s > 0 return {FAR}", [[True] * 3, [True] * 3]),
        (f"s = tensor() return {NEAR} if (s > 0) & (length < 20) return {FAR}", [[True] * 3, [True] * 3]),
        (f"a = {NEAR} return a if length < 20 return gate(a, {FAR})", [[True] * 3, [False, True, True]]),
    ],
)
def test_a_softmax_is_wanted_where_its_result_answers(body: str, wanted: list[list[bool]]) -> None:
    assert list(answers(body, (19, 20, 30)).values()) == wanted


def test_what_a_choice_reads_is_always_wanted() -> None:
    """Lists are made, and returned, at any length."""
    body = (
        "e = compress(16, 16) coarse = attend(e) c = top_k(2, score = mass(coarse), share = sum(group), unit = 16) "
        f"return {NEAR} if length < 20 return gate(coarse, attend(c))"
    )
    found = answers(body, (19, 20, 30))
    assert found["coarse"] == [True] * 3
    assert [name for name, at in found.items() if at == [False, True, True]] == [list(found)[-1]]
