"""Which merges are one operator in training."""

from __future__ import annotations

import pytest

from tests.cost.plans import plan_of_text

A, B, C = (
    "a = attend(sliding(16))",
    "b = attend(sink(4) - sliding(16))",
    "c = attend(first(1, unit = 64) - sliding(16) - sink(4))",
)
CHOSEN = "e = compress(16, 16) r = dot(e) u = top_k(2, score = r, share = sum(group), unit = sum(16))"


def joints(body: str) -> list[tuple[str, ...]]:
    return [found.parts for found in plan_of_text(f"pattern p {{ causal {body} }}").joints]


@pytest.mark.parametrize(
    "body, wanted",
    [
        (f"{A} {B} return merge(a, b)", [("a", "b")]),
        (f"{A} {B} {C} return merge(merge(a, b), c)", [("a", "b", "c")]),
        (f"{A} {B} {C} return gate(merge(a, b), c)", [("a", "b")]),
        (f"{A} {B} return merge(a, b) if length < 9 return gate(merge(a, b), attend(all))", [("a", "b")]),
        (f"{CHOSEN} x = attend(u | sliding(16)) return x", [("x_listed", "x_rest")]),
        # a part that is read by itself, too
        (f"{A} {B} return merge(a, b), a", []),
        (f"{A} {B} return merge(a, b) if length < 9 return a", []),
        (f"{A} {B} {C} return gate(merge(a, b), merge(a, c))", []),
        # a score reads its log-sum-exp
        (f"{A} {B} return merge(a, b), mass(a)", []),
        # by residue class
        ("return merge(attend(dilated(8, 2)), attend(sink(4) - dilated(8, 2)))", []),
        # a sink has a gradient, what is read has none
        (
            "s = tensor(head) return merge(attend(sliding(8), sink_logit = s), "
            "attend(all - sliding(8), bias = -s[h] * (q - k)))",
            [],
        ),
        # not in training
        (f"{A} {B} return attend(all) if train return merge(a, b)", []),
        (f"{A} {B} return gate(a, b)", []),
    ],
)
def test_a_merge_is_one_operator_if_nothing_else_reads_its_parts(body: str, wanted: list[tuple[str, ...]]) -> None:
    assert joints(body) == wanted
