"""Softmaxes over selected units and other keys, taken apart: disjoint parts whose union is the whole."""

from __future__ import annotations

import sympy

from spdsl.ir.pattern import Gate, Merge, Pattern, Softmax
from spdsl.ir.symbols import Boolean, K, Q, is_membership, lookups
from spdsl.passes.disjuncts import disjuncts
from spdsl.passes.split import parts, split
from tests.passes.lowered import lowered, of_file, softmax

CHOSEN = "causal blocks = compress(16) c = top_k(4, score = dot(blocks), share = head, force = last(1)) "


def on_stream(softmaxes: tuple[Softmax, ...], stream: str = "kv") -> list[Boolean]:
    return [term.test for found in softmaxes for term in found.terms if term.stream == stream]


def values(test: Boolean) -> list[bool]:
    """The test at positions around the edges of units, for a key in the choice and for one that is not."""
    reads = [read for read in lookups(test) if is_membership(read)]
    settled = [test.xreplace(dict.fromkeys(reads, sympy.Integer(held))) for held in (0, 1)]
    return [
        one.xreplace({Q: sympy.Integer(q), K: sympy.Integer(k)}) is sympy.true
        for one in settled
        for q in (0, 15, 16, 40, 63, 64)
        for k in (0, 1, 8, 15, 16, 17, 32, 39, 40, 47, 48, 63, 64, 65)
    ]


def check_parts(pattern: Pattern, whole: Softmax, stream: str = "kv") -> tuple[Softmax, ...]:
    """Every pair of the whole lies in one of the parts, and in one only; -> the parts."""
    found = parts(pattern, whole)
    tests = on_stream(found, stream)
    (test,) = on_stream((whole,), stream)
    assert [sum(held) for held in zip(*map(values, tests), strict=True)] == [int(held) for held in values(test)]
    for i, one in enumerate(tests):
        assert all(disjuncts(sympy.And(one, other)) == () for other in tests[:i]), "provably disjoint"
    return found


def test_infllm_v2() -> None:
    pattern = of_file("infllm_v2")
    whole = softmax(pattern, "attend_2")
    listed, rest = parts(pattern, whole)
    assert (listed.name, rest.name) == ("attend_2_listed", "attend_2_rest")
    tests = (listed.terms[0].test, rest.terms[0].test)
    assert disjuncts(sympy.And(*tests)) == ()
    assert [bool(lookups(test)) for test in tests] == [True, False]
    assert split(pattern).cases[1].branch == Merge((listed, rest))
    assert split(pattern).cases[0] == pattern.cases[0]


def test_union_with_static_sets() -> None:
    for others in ("sliding(8)", "sink(3) | sliding(24)", "last(2, unit = 16) - sink(17)", "(sliding(30) & ~sink(9))"):
        pattern = lowered(f"{CHOSEN} return attend(c | {others})")
        assert len(check_parts(pattern, softmax(pattern, "attend"))) == 2


def test_a_choice_within_another_set_keeps_that_set() -> None:
    pattern = lowered(f"{CHOSEN} return attend(c & sliding(40) | sink(2))")
    listed, _ = check_parts(pattern, softmax(pattern, "attend"))
    assert not any(values(listed.terms[0].test & (Q - K >= 40)))


def test_what_needs_no_split_stays() -> None:
    whole = "c; c & sliding(40); c - sink(3); sliding(8); all - c; ~c | sink(1); c & sink(9) | ~c & sliding(9)"
    for body in whole.split("; "):
        pattern = lowered(f"{CHOSEN} return attend({body})")
        assert split(pattern) == pattern, body
    two = lowered(f"{CHOSEN} d = top_k(2, score = dot(blocks), share = head) return attend(c | d)")
    assert split(two) == two


def test_choices_that_no_list_kernel_walks_stay() -> None:
    pattern = lowered("causal c = given(unit = 16, rows = 2) return attend(c | sliding(8)) if prefill")
    assert split(pattern) == pattern


def test_chosen_keys_that_other_sets_hold_are_no_part() -> None:
    pattern = lowered("causal c = given() return attend(c & sliding(3) | sliding(64)) if prefill")
    (softmax,) = split(pattern).softmaxes()
    (alone,) = lowered("causal return attend(sliding(64)) if prefill").softmaxes()
    assert [term.test for term in softmax.terms] == [term.test for term in alone.terms]


def test_a_list_of_the_caller_for_single_queries_is_walked() -> None:
    pattern = lowered("causal c = given() return attend(c | sliding(8)) if prefill")
    assert [one.name for one in split(pattern).softmaxes()] == ["attend_listed", "attend_rest"]


def test_a_choice_of_tiles_of_rows_is_walked_too() -> None:
    rows = "top_k(4, score = dot(kv), share = head, unit = max(16), rows = max(2))"
    pattern = lowered(f"causal c = {rows} return attend(c | sliding(8)) if prefill")
    (case,) = split(pattern).cases
    assert [one.name for one in split(pattern).softmaxes() if one.name.startswith("attend")] == [
        "attend_listed",
        "attend_rest",
    ]
    assert isinstance(case.branch, Merge)


def test_terms_of_several_streams() -> None:
    pattern = lowered(f"{CHOSEN} far = stream() return attend(far[c] | sliding(8) | blocks)")
    found = parts(pattern, softmax(pattern, "attend"))
    assert [(part.name, *(term.stream for term in part.terms)) for part in found] == [
        ("attend_listed", "far"),
        ("attend_rest", "kv"),
        ("attend_rest_2", "blocks"),
    ]


def test_the_sink_counts_once_and_the_rest_of_the_softmax_in_each_part() -> None:
    body = (
        "low = tensor(head) return attend(c | sliding(8), softcap = 3, scale = 1 / 2, sink_logit = low, bias = q - k)"
    )
    pattern = lowered(f"{CHOSEN} {body}")
    listed, rest = parts(pattern, softmax(pattern, "attend"))
    assert (listed.sink, rest.sink) == (None, "low")
    for part in (listed, rest):
        assert (part.softcap, part.scale, part.bias, part.query) == (3, sympy.Rational(1, 2), Q - K, "q")


def test_inside_of_gates_and_further_results() -> None:
    pattern = lowered(f"{CHOSEN} a = attend(c | sliding(8)) b = attend(sink(1)) return gate(a, b), a")
    (case,) = split(pattern).cases
    merged = Merge(parts(pattern, softmax(pattern, "a")))
    assert case.branch == Gate((merged, softmax(pattern, "b")))
    assert case.extras == (merged,)
