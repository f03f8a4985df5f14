"""W404: a pattern with cached phases that surely shows later keys is asked for its `causal`, and no other one is."""

from __future__ import annotations

from pathlib import Path

import pytest

import spdsl
from spdsl.diagnostics import Applicability, Diagnostic, Hint, SpatError
from spdsl.passes.later_keys import later_key
from tests.passes.lowered import PATTERNS, meaning
from tests.passes.random_sets import HEADER, Maker, Setting


def told(text: str) -> list[Diagnostic]:
    return [found for found in spdsl.check(text) if found.code == "W404"]


LATER = (
    "attend(all)", "attend(sliding(4, ahead = 2))", "attend(sink(4) | sliding(4))", "attend(last(2, unit = 64))",
    "attend(last(1, unit = 16, rows = 64))", "attend(strided(7))", "attend(fixed(32, 4))", "attend(all - sliding(64))",
    "attend(cover(sliding(20), rows = 16, unit = 16))", "attend(random(3))", "attend(where(k // 64 <= q // 64))",
    "attend(where(abs(q - k) < 64 & k % 2 == 0))", "attend(where(k >= length - 3))", "attend(where(k <= max(q, 9)))",
    "attend(where(h % 2 == 1) | sliding(3))", "attend(where(q > 300 & k == q + 5))", "attend(compress(16))",
    "gate(attend(compress(32, 16)), attend(sliding(4)))", "merge(attend(sliding(4)), attend(all - sliding(4)))",
    "attend(top_k(3, score = dot(compress(64)), share = head))", "attend(all) if length < 1000",
    "attend(all) if prefill", "attend(where(k // 128 == q // 128 + 3) | sliding(4))",
)  # fmt: skip
EARLIER = (
    "attend(sliding(4))", "attend(sliding(4) & sink(2))", "attend(dilated(8, 4))", "attend(open(16))",
    "attend(where(k <= q))", "attend(where(q >= k & q - k < 5))", "attend(~where(k > q))", "attend(where(k * k <= q))",
    "attend(where(k // 64 < q // 64) | sliding(64))", "attend(where(2 * k <= q) | sliding(3))", "attend(all) if train",
    "attend(all) if decode", "attend(sliding(3), bias = k - q)", "attend(where(max(k, 5) <= q))",
)  # fmt: skip
READS = {  # later keys are seen or not, as the caller's numbers say
    "doc = tensor(token, int) return attend(where(doc[q] == doc[k]))": False,
    "doc = tensor(token, int) return attend(where(doc[q] == doc[k]) & sliding(4))": False,
    "doc = tensor(token, int) return attend(where(doc[q] == doc[k]) | sliding(4, ahead = 1))": True,
    "n = tensor(int) return attend(where(k < n | k <= q))": False,
    "m = tensor(token, bool) return attend(where(m[k]))": False,
    "m = tensor(token, bool) return merge(attend(where(m[q])), attend(sliding(3, ahead = 1) - where(m[q])))": True,
    "tiles_in = given(unit = 64, rows = 64) return attend(tiles_in | sliding(4))": False,
    "tiles_in = given(unit = 64, rows = 64) return attend(tiles_in | first(4))": True,
    "s = tensor() return attend(all) if s > 0 return attend(sliding(4))": False,
    "other = stream() return attend(other[all])": True,
    "return attend(all) if train return attend(sliding(3))": True,
    "heads query = 1, kv = 1 return attend(where(h == 1) | sliding(3))": False,
    "heads query = 8, kv = 2 return attend(where(h == 7) | sliding(3))": True,
    "heads query = 64, kv = 2 return attend(where(h >= 40 & h < 42) | sliding(3))": True,
    "heads query = 8, kv = 2 return attend(where(h == 8) | sliding(3))": False,
    "return attend(where(h == 7) | sliding(3))": False,
    "return attend(threshold(0.1, score = softmax(dot(compress(64)))))": False,
}


@pytest.mark.parametrize("result", LATER)
def test_later_keys_are_told(result: str) -> None:
    assert len(told(f"pattern p {{ return {result} }}")) == 1


@pytest.mark.parametrize("result", LATER[:3])
def test_both_ways_out(result: str) -> None:
    assert told(f"pattern p {{ return {result} causal }}") == []
    assert told(f"pattern p {{ return {result} if train }}") == []
    assert told(f"pattern p {{ allow(W404) return {result} }}") == []


@pytest.mark.parametrize("result", EARLIER)
def test_earlier_keys_are_not(result: str) -> None:
    assert told(f"pattern p {{ return {result} }}") == []


@pytest.mark.parametrize("body, seen", READS.items())
def test_what_tensors_and_lists_decide_is_not(body: str, seen: bool) -> None:
    assert len(told(f"pattern p {{ {body} }}")) == seen


@pytest.mark.parametrize("path", sorted(PATTERNS.glob("*.spat")), ids=lambda path: path.stem)
def test_shipped_patterns_say_what_they_mean(path: Path) -> None:
    assert told(str(path)) == []


def test_the_message() -> None:
    (found,) = told("pattern p {\n    param n = 4\n    return attend(first(n))\n}")
    assert found.severity.value == "warning"
    assert found.message == (
        "queries see later keys in a pattern with `prefill` and `decode`: "
        "write `causal`, or say that it is meant: `return ... if train` or `allow(W404)`"
    )
    assert found.label == "query 0 sees key 1 of `kv`"
    (hint,) = found.hints
    assert (hint.text, hint.applicability, hint.replacement) == ("write `causal`", Applicability.MAYBE, "causal\n    ")


@pytest.mark.parametrize(
    "text", ["pattern p {\n\tx = sink(4)\n\treturn attend(x)\n}", "pattern p { return attend(all) }"]
)
def test_the_hint_mends_it(text: str) -> None:
    (found,) = told(text)
    (hint,) = found.hints
    assert isinstance(hint, Hint)
    assert hint.span is not None
    assert spdsl.check(text[: hint.span.start] + str(hint.replacement) + text[hint.span.end :]) == []


def test_what_is_told_is_so() -> None:
    """Random sets, masked pair by pair on tensors of random values: the key that is named is visible."""
    shown = 0
    for seed in range(24):
        one = Maker(seed).set((1, 0, 1, 2)[seed % 4])
        try:
            pattern = meaning(f"pattern p {{ {HEADER} return attend({one.text}) }}")
        except SpatError:  # never holds
            continue
        found = later_key(pattern, pattern.cases[0])
        if found is not None and one.exact:
            place = found.place
            s = Setting(rows=place.length, keys=place.length, causal=False, seed=seed)
            assert place.q < place.k < place.length, one.text
            assert one.seen(s)[:, place.q, place.k].any(), one.text
            shown += 1
    assert shown > 5
