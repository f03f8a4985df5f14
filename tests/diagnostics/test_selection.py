"""What can be wrong with entries, scores and choices: the code, and the text that it points at."""

# ruff: noqa: E501 (one message a line)
from __future__ import annotations

import pytest

import spdsl

E = "e = compress(16) "
M = "m = compress(8, of = q, by = mean, partial = keep) "
W = "e = compress(8, 4) "
G = "heads query = 8, kv = 2 "
CASES = [
    # entries
    ("return attend(compress(8, 4, before = 8))", "E203", "compress(8, 4, before = 8)", "begins 8 before its place"),
    ("return attend(compress(8, 4, before = -1))", "E203", "-1", "at least 0"),
    ("return attend(compress(8, partial = kep))", "E202", "kep", "one of `drop`, `keep`"),
    ("r = compress(8, partial = keep, by = weighted) return attend(top_k(2, score = dot(r), share = head, unit = max(16), force = last(1))) if prefill return attend(all)", "E105", "dot(r)", "learned pools"),
    ("a = attend(compress(8, partial = keep)) return gate(a, attend(top_k(2, score = mass(a), unit = 16, force = last(1)))) if prefill return attend(all)", "E311", "attend(compress(8, partial = keep))", "for `prefill` sees it"),
    ("return attend(compress(8, partial = keep))", "E311", "attend(compress(8, partial = keep))", "for `prefill` and `decode` sees it"),
    ("r = compress(8, partial = keep) return attend(top_k(2, score = dot(r), share = head, unit = max(16))) if decode return attend(all)", "E311", "dot(r)", "for `decode` sees it"),
    (E + "return attend(top_k(2, score = dot(compress(16, before = 4)), share = head))", "E105", "top_k(2, score = dot(compress(16, before = 4)), share = head)", "overlapping entries"),
    ("return attend(top_k(2, score = dot(compress(16, before = 4)), share = head, unit = 16))", "E206", "top_k(2, score = dot(compress(16, before = 4)), share = head, unit = 16)", "`unit = 16`"),
    ("return attend(compress(4, 8))", "E203", "compress(4, 8)", "leaves tokens out"),
    (E + "return attend(compress(4, of = e))", "E105", "compress(4, of = e)", "made of entries"),
    ("return attend(compress(4, of = q))", "E203", "compress(4, of = q)", "each query needs a cell"),
    ("return attend(compress(4, of = q, partial = keep))", "E201", "compress(4, of = q, partial = keep)", "a set is expected"),
    (M + "return attend(top_k(2, score = dot(kv, query = compress(4, of = m, partial = keep)), share = head, unit = max(16)))", "E105", "compress(4, of = m, partial = keep)", "cells of cells"),
    ("m = compress(4, 2, of = q, partial = keep) return attend(all)", "E203", "compress(4, 2, of = q, partial = keep)", "one cell"),
    ("m = compress(4, of = q, partial = keep, by = mlp) return attend(all)", "E105", "compress(4, of = q, partial = keep, by = mlp)", "pooled by `mlp`"),
    (M + "return attend(all), dot(kv, query = m)", "E105", "dot(kv, query = m)", "a query of cells"),
    ("return attend(top_k(2, score = softmax(dot(kv, query = tail(q, 8))), share = head, unit = sum(16)))", "E206", "top_k(2, score = softmax(dot(kv, query = tail(q, 8))), share = head, unit = sum(16))", "the last queries of a call alone"),
    ("return attend(top_k(2, score = softmax(dot(kv, query = tail(q, 8))), rows = sum(all), share = head, unit = sum(16)))", "E310", "top_k(2, score = softmax(dot(kv, query = tail(q, 8))), rows = sum(all), share = head, unit = sum(16))", "for all queries"),
    ("return attend(top_k(2, score = dot(kv), rows = all, share = head, unit = max(16)))", "E206", "top_k(2, score = dot(kv), rows = all, share = head, unit = max(16))", "`rows = all`"),
    ("return attend(kv, query = tail(q, 8))", "E105", "attend(kv, query = tail(q, 8))", "of the last queries alone"),
    ("return attend(all), pool(dot(kv), rows = max(all))", "E105", "pool(dot(kv), rows = max(all))", "results of a score"),
    (M + "return attend(all), dot(kv, query = tail(m, 2))", "E105", "tail(m, 2)", "the last rows of `m`"),
    (M + "return attend(kv, query = m)", "E310", "attend(kv, query = m)", "stands for 8 queries"),
    (M + E + "return attend(top_k(2, score = dot(e, query = m), share = head, rows = max(12)))", "E203", "top_k(2, score = dot(e, query = m), share = head, rows = max(12))", "no multiple of the 8 queries"),
    (M + E + "return attend(top_k(2, score = dot(e, query = m), share = head, rows = 16))", "E206", "top_k(2, score = dot(e, query = m), share = head, rows = 16)", "`rows = 16`"),
    (M + E + "return attend(top_k(2, score = dot(e, query = m), share = head))", "E310", "top_k(2, score = dot(e, query = m), share = head)", "8 queries at once"),
    ("return attend(compress(4, by = linear(mean)))", "E105", "linear", "`linear` is not built"),
    ("return attend(compress(4, by = meen))", "E202", "meen", "one of `mean`"),
    ("z = stream(qk = 8) return attend(compress(4, by = softmax(z)))", "E201", "compress(4, by = softmax(z))", "another shape"),
    ("return attend(compress(length))", "E309", "length", "not known when compiling"),
    ("z = stream(value = none) return attend(compress(4, of = z))", "E201", "attend(compress(4, of = z))", "no values"),
    (E + "return attend(e[sliding(8)])", "E105", "attend(e[sliding(8)])", "sets of the entries of `e`"),
    (E + "c = top_k(2, score = dot(e), share = head) return attend(e[c])", "E201", "attend(e[c])", "counts tokens"),
    ("e_k_up = tensor(head) e = compress(8, by = mlp) return attend(e, bias = e_k_up[h])", "E104", "compress(8, by = mlp)", "`e_k_up`"),
    # scores
    (E + "return attend(top_k(2, score = e, share = head))", "E201", "e", "a score is expected"),
    (E + "return attend(top_k(2, score = bound(e), share = head))", "E105", "bound", "`bound` is not built"),
    (E + "return attend(top_k(2, score = dot(e) + 1, share = head))", "E201", "1", "a score is expected"),
    (E + "r = dot(e) * dot(e) return attend(top_k(2, score = r, share = head))", "E201", "dot(e)", "multiplied by a number"),
    ("a = attend(all) return attend(top_k(2, score = a, share = head))", "E201", "a", "a score is expected"),
    ("a = attend(sink(9)) b = gate(a, a) return attend(top_k(2, score = mass(b)))", "E201", "mass(b)", "only one softmax"),
    ("z = stream() a = attend(sink(9) | z[all - sink(9)]) return attend(top_k(2, score = mass(a)))", "E105", "mass(a)", "several streams"),
    (G + "i = query(heads = 3) return attend(top_k(2, score = cosine(kv, query = i)))", "E306", "cosine(kv, query = i)", "do not divide the 3"),
    (E + "return attend(top_k(2, score = softmax(softmax(dot(e)))))", "E201", "softmax(softmax(dot(e)))", "probabilities already"),
    (G + "i = query(heads = 3) return attend(top_k(2, score = dot(kv, query = i)))", "E306", "dot(kv, query = i)", "do not divide the 3"),
    (G + "i = query(heads = 2) return attend(top_k(2, score = dot(kv, query = i), share = head))", "E306", "top_k(2, score = dot(kv, query = i), share = head)", "2 heads of the score"),
    # grains
    (E + "return attend(top_k(2, score = dot(e)))", "E206", "top_k(2, score = dot(e))", "`share = group`"),
    (W + "return attend(top_k(2, score = dot(e), share = head, unit = 16))", "E206", "top_k(2, score = dot(e), share = head, unit = 16)", "`unit = 16`"),
    (E + "return attend(top_k(2, score = dot(e), share = head, rows = 4)) if prefill", "E206", "top_k(2, score = dot(e), share = head, rows = 4)", "`rows = 4`"),
    (E + "return attend(all), pool(dot(e), share = group)", "E206", "pool(dot(e), share = group)", "`share = group`"),
    (W + "return attend(top_k(2, score = dot(e), share = head))", "E105", "top_k(2, score = dot(e), share = head)", "overlapping entries"),
    (W + "return attend(top_k(2, score = dot(e), share = head, unit = max(18)))", "E203", "top_k(2, score = dot(e), share = head, unit = max(18))", "no multiple of the stride 4"),
    (E + "return attend(top_k(2, score = dot(e), share = head, unit = max(0)))", "E203", "0", "at least 1"),
    (E + "return attend(top_k(2, score = dot(e), share = layer))", "E105", "layer", "`share = layer`"),
    (E + "return attend(top_k(2, score = dot(e), share = union(group)))", "E105", "union(group)", "`share = union`"),
    (E + "return attend(top_k(2, score = dot(e), share = heed))", "E202", "heed", "one of `head`, `group`"),
    (E + "return attend(top_k(2, score = dot(e), share = head, unit = max(labels)))", "E105", "labels", "`unit = labels`"),
    (E + "return attend(top_k(2, score = dot(e), share = head, across = head))", "E105", "across", "`across` of `top_k`"),
    (E + "return attend(top_k(2, score = dot(e), share = head, when = 3))", "E105", "when", "`when` of `top_k`"),
    # choices
    (E + "return attend(top_k(0, score = dot(e), share = head))", "E203", "0", "at least 1"),
    (E + "return attend(top_k(length / 8, score = dot(e), share = head))", "E309", "length / 8", "not known when compiling"),
    (E + "return attend(top_k(4, score = dot(e), share = head, least = length / 8))", "E309", "top_k(4, score = dot(e), share = head, least = length / 8)", "not known when compiling"),
    (E + "return attend(top_k(8 * q, score = dot(e), share = head, most = 4))", "E205", "8 * q", "for all queries and keys"),
    (E + "x = tensor(token) return attend(threshold(x[k], score = dot(e), share = head))", "E205", "x[k]", "for all queries"),
    (E + "x = tensor(token) return attend(threshold(x[8], score = dot(e), share = head))", "E204", "threshold(x[8], score = dot(e), share = head)", "no token of its own"),
    (E + "x = tensor(head) return attend(threshold(x[h], score = dot(e), share = max(group)))", "E204", "threshold(x[h], score = dot(e), share = max(group))", "one list"),
    (E + "return attend(top_k(2, share = head))", "E202", "top_k(2, share = head)", "needs `score`"),
    (E + "return attend(top_k(2, score = dot(e), share = head, least = 4, most = 3))", "E203", "top_k(2, score = dot(e), share = head, least = 4, most = 3)", "at least 4"),
    (E + "return attend(threshold(2, score = dot(e), share = head, least = 4, most = 3))", "E203", "threshold(2, score = dot(e), share = head, least = 4, most = 3)", "at least 4"),
    (E + "return attend(threshold(2, score = dot(e), share = head, least = -1))", "E203", "-1", "at least 0"),
    (E + "return attend(threshold(2, score = dot(e), share = head, least = 20000 * 30000))", "E203", "threshold(2, score = dot(e), share = head, least = 20000 * 30000)", "exceed any sequence"),
    (E + "return attend(top_k(2, score = dot(e), share = head, force = kv[first(1)]))", "E201", "top_k(2, score = dot(e), share = head, force = kv[first(1)])", "`force` names units"),
    (E + "return attend(top_k(2, score = dot(e), share = head, within = where(h > 1)))", "E105", "top_k(2, score = dot(e), share = head, within = where(h > 1))", "`within` cannot read"),
    (E + "x = tensor(token) return attend(top_k(2, score = dot(e), share = head, rows = max(32), within = where(x[q] > 0))) if prefill", "E105", "top_k(2, score = dot(e), share = head, rows = max(32), within = where(x[q] > 0))", "reads `x` at the query"),
    (E + "x = tensor(query) return attend(top_k(2, score = dot(e), share = head, rows = max(32), force = where(x[q] > 0))) if prefill", "E105", "top_k(2, score = dot(e), share = head, rows = max(32), force = where(x[q] > 0))", "reads `x` at the query"),
    (E + "c = top_k(1, score = dot(e), share = head) return attend(top_k(2, score = dot(e), share = head, rows = max(32), within = c)) if prefill", "E105", "top_k(2, score = dot(e), share = head, rows = max(32), within = c)", "a list for each query"),
    (E + "c = top_k(1, score = dot(e), share = head, rows = max(16)) return attend(top_k(2, score = dot(e), share = head, rows = max(32), within = ~c)) if prefill", "E201", "top_k(2, score = dot(e), share = head, rows = max(32), within = ~c)", "tiles of 16 queries of `c`"),
    (E + "c = given(rows = 48) return attend(top_k(2, score = dot(e), share = head, rows = max(32), within = c)) if prefill", "E201", "top_k(2, score = dot(e), share = head, rows = max(32), within = c)", "tiles of 48 queries of `c`"),
    (E + "c = top_k(1, score = dot(e), share = head, rows = max(32)) return attend(top_k(2, score = dot(e), share = head, rows = max(all), within = c)) if prefill", "E201", "top_k(2, score = dot(e), share = head, rows = max(all), within = c)", "for all queries together"),
    (E + "return attend(top_k(2, score = dot(e), share = head, force = first(2) | last(1)))", "E203", "top_k(2, score = dot(e), share = head, force = first(2) | last(1))", "3 units are forced"),
    (E + "return attend(threshold(1, score = dot(e), share = head, force = sliding(20), most = 2))", "E203", "threshold(1, score = dot(e), share = head, force = sliding(20), most = 2)", "3 units are forced"),
    (E + "return attend(top_k(2, score = dot(e), share = head, rows = max(4)))", "E310", "top_k(2, score = dot(e), share = head, rows = max(4))", "4 queries at once"),
    (E + "c = top_k(2, score = dot(e), share = head) return attend(all - c)", "E105", "attend(all - c)", "this use of `c`"),
    ("c = given() return attend(all - c)", "E105", "attend(all - c)", "this use of `c`"),
    ("c = given() d = given() return attend(c & d)", "E105", "attend(c & d)", "this use of `c`"),
    (E + "c = top_k(2, score = dot(e), share = head) return attend(all)", "W107", "c", "never used"),
    ("d = tensor(token) a = attend(where(d[k])) return attend(top_k(2, score = mass(a)))", "E105", "top_k(2, score = mass(a))", "reads tensors or choices"),
    ("e = compress(16) c = top_k(2, score = dot(e), share = head) a = attend(c | sliding(8)) return a, mass(a)", "E105", "attend(c | sliding(8))", "the mass of `a`"),
    (E + "return attend(top_k(2 * 10000 * 30000, score = dot(e), share = head))", "E203", "top_k(2 * 10000 * 30000, score = dot(e), share = head)", "exceed any sequence"),
    (E + "return merge(attend(e), attend(e))", "E304", "merge(attend(e), attend(e))", "share keys of `e`"),
    (E + "c = top_k(2, score = dot(e), share = head) return merge(attend(c), attend(sink(9)))", "W403", "merge(attend(c), attend(sink(9)))", "may share keys of `kv`"),
    (E + "z = stream() c = top_k(2, score = dot(e), share = head) return attend(z[c] | sink(9))", "E303", "attend(z[c] | sink(9))", "may both bring"),
    # results
    ("a = attend(all) return mass(a)", "E201", "mass(a)", "a branch is expected"),
    ("a = attend(all) return a, sliding(3)", "E201", "sliding(3)", "a result is expected"),
    (G + "i = query(heads = 4) return attend(all), dot(kv, query = i)", "E105", "dot(kv, query = i)", "a result of 4 heads"),
    ("return attend(all), kl(dot(kv), dot(kv))", "E201", "kl(dot(kv), dot(kv))", "is a probability"),
    (E + "a = attend(all) return a, kl(mass(a), dot(e))", "E201", "kl(mass(a), dot(e))", "different entries"),
]  # fmt: skip


@pytest.mark.parametrize("body, code, place, message", CASES)
def test_code_and_place(body: str, code: str, place: str, message: str) -> None:
    text = f"pattern p {{ causal {body} }}"
    (found,) = spdsl.check(text)
    assert found.code == code
    assert message in found.message
    assert found.span is not None
    assert text[found.span.start : found.span.end] == place


@pytest.mark.parametrize("word", ["top_k", "threshold"])
def test_least_above_most_has_a_nearest_value(word: str) -> None:
    text = "pattern p {{ causal {}return attend({}(2, score = dot(e), share = head, least = {}, most = 3)) }}"
    (found,) = spdsl.check(text.format(E, word, 4))
    (hint,) = found.hints
    assert hint.text == "use `least = 3`"
    assert hint.span is not None
    assert hint.replacement == "3"
    fixed = text.format(E, word, 4)
    assert fixed[: hint.span.start] + hint.replacement + fixed[hint.span.end :] == text.format(E, word, 3)
    assert spdsl.check(text.format(E, word, 3)) == []


@pytest.mark.parametrize(
    "body",
    [
        "causal return attend(compress(8, 4))",  # the first queries see nothing: that is what cells are
        "causal e = compress(8) return gate(attend(e), attend(sliding(4)))",
        "causal e = compress(8) return merge(attend(e), attend(sliding(4)))",
        "causal e = compress(16) c = top_k(2, dot(e), head) return merge(attend(c - sink(9)), attend(sink(9)))",
        "causal e = compress(16) return attend(top_k(3, score = dot(e), share = head, force = first(2) | last(1)))",
        "causal e = compress(16) return attend(top_k(1, score = dot(e), share = head, force = first(9), within = ~first(8)))",
    ],
)
def test_no_findings(body: str) -> None:
    assert spdsl.check(f"pattern p {{ {body} }}") == []


@pytest.mark.parametrize("operator", ["|", "-", "+"])
def test_long_unions_and_sums_take_no_time(operator: str) -> None:
    for word, use in (("sink(1)", "force"), ("dot(kv)", "score")):
        found = spdsl.check(
            f"pattern p {{ a = {operator.join([word] * 90)} return attend(top_k(2, score = dot(kv), {use} = a)) }}"
        )
        assert found


def test_overrides_of_grains() -> None:
    text = "pattern p { param unit = 16 causal e = compress(16) return attend(top_k(2, score = dot(e), share = head, unit = max(unit))) }"
    assert spdsl.check(text, unit=32) == []
    assert [found.code for found in spdsl.check(text, unit=12)] == ["E502"]


def test_words_that_are_not_built_are_named_inside_of_others() -> None:
    text = "pattern p { causal a = compress(8, by = linear(mean)) return attend(top_k(2, score = dot(rotate(a)), share = head)) }"
    assert [found.message.split("`")[1] for found in spdsl.check(text)] == ["linear", "rotate"]
