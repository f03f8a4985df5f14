"""What can be wrong with a softmax that skips tiles: the code, and the text that it points at."""

# ruff: noqa: E501 (one message a line)
from __future__ import annotations

import pytest

import spdsl

T = "rows = 16, unit = 16"
CASES = [
    (f"return attend(all, skip = below(1 / q, {T}))", "E203", "q", "may be 0 or less"),
    (f"return attend(all, skip = below(k, {T}))", "E205", "k", "one for all queries and keys"),
    (f"d = tensor(token) return attend(all, skip = below(d[q], {T}))", "E205", "d[q]", "one for all queries and keys"),
    (f"d = tensor(token) return attend(all, skip = below(d[0], {T}))", "E204", f"below(d[0], {T})", "a number for each position"),
    ("return attend(all, skip = below(1, rows = 48))", "E203", "below(1, rows = 48)", "no power of two"),
    ("return attend(all, skip = below(1, rows = 8))", "E203", "below(1, rows = 8)", "no power of two"),
    ("return attend(all, skip = below(1, rows = 512))", "E203", "512", "at most 256"),
    ("return attend(all, skip = below(1, unit = 8)) if decode", "E203", "8", "at least 16"),
    ("return attend(all, skip = below(1, unit = 96)) if decode", "E203", "below(1, unit = 96)", "no power of two"),
    ("return attend(all, skip = below(1, restart = 100)) if decode", "E203", "below(1, restart = 100)", "cuts a tile of 128 keys"),
    ("return attend(all, skip = below(1, share = all)) if decode", "E202", "all", "one of `head`, `group`"),
    ("return attend(all, skip = 3)", "E201", "3", "a rule to skip by is expected"),
    ("return attend(all, skip = sink(3))", "E201", "sink(3)", "a rule to skip by is expected"),
    (f"return attend(all, skip = below(1, {T}))", "E203", f"attend(all, skip = below(1, {T}))", "in a result for `decode`"),
    ("return attend(all, skip = below(1))", "E203", "attend(all, skip = below(1))", "rows = 1 in a result for `train` and `prefill`"),
    (f"return attend(compress(8), skip = below(1, {T})) if train", "E105", f"attend(compress(8), skip = below(1, {T}))", "over cells of tokens"),
    (f"z = stream() return attend(sink(9) | z[all - sink(9)], skip = below(1, {T})) if train", "E105", f"attend(sink(9) | z[all - sink(9)], skip = below(1, {T}))", "over several streams"),
    ("c = given(unit = 16) return attend(c, skip = below(1)) if decode", "E105", "attend(c, skip = below(1))", "skipping tiles of `c`"),
    (f"c = top_k(2, score = softmax(dot(compress(16)))) return attend(c, skip = below(1, {T})) if train", "E105", f"attend(c, skip = below(1, {T}))", "skipping tiles of `c`"),
    (f"s = tensor(head) return attend(all, bias = s[h] * (q - k), skip = below(1, {T})) if train", "E105", f"attend(all, bias = s[h] * (q - k), skip = below(1, {T}))", "a bias that reads `s`"),
    (f"return attend(sliding(9) & where(h > 2), skip = below(1, {T}, share = group)) if train", "E105", f"attend(sliding(9) & where(h > 2), skip = below(1, {T}, share = group))", "differs by head"),
    (f"a = attend(all, skip = below(1, {T})) return attend(top_k(2, score = mass(a), unit = 16)) if train", "E105", "mass(a)", "the mass of a softmax that skips"),
    ("a = attend(all) return a, kept(a)", "E201", "kept(a)", "only a softmax that skips tiles"),
    (f"a = attend(all, skip = below(1, {T})) b = gate(a, a) return b, kept(b)", "E201", "kept(b)", "only a softmax that skips tiles"),
]  # fmt: skip


@pytest.mark.parametrize("body, code, place, message", CASES, ids=[body[:60] for body, *_ in CASES])
def test_what_is_refused(body: str, code: str, place: str, message: str) -> None:
    text = f"pattern p {{ causal {body} }}"
    found = [one for one in spdsl.check(text) if one.severity.value == "error"]
    assert [(one.code, text[one.span.start : one.span.end]) for one in found] == [(code, place)]
    assert message in f"{found[0].message} {found[0].label}"


@pytest.mark.parametrize("body", [
    f"a = given(rows = 16, unit = 16) return attend(a, skip = below(1 / length, {T})) if train | prefill",
    f"d = tensor(token, int) return attend(where(d[k] == d[q]), skip = below(1 / (length + h), {T})) if train",
    f"s = tensor(head) return attend(all, bias = s[h] * (q - k), skip = below(1, {T})) if prefill",
    "x = tensor(kv_head) return attend(sink(3) | sliding(64), skip = below(x[h], restart = 512, share = group)) if decode",
    f"near = attend(sliding(64), skip = below(1, {T})) return merge(near, attend(all - sliding(64))) if train",
])  # fmt: skip
def test_what_is_not(body: str) -> None:
    assert [one for one in spdsl.check(f"pattern p {{ causal {body} }}") if one.severity.value == "error"] == []
    assert spdsl.compile(f"pattern p {{ causal {body} }}").text
