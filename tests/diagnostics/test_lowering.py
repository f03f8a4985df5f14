"""Findings of the lowering, as they are shown; several of them in one run; names that the module needs itself."""

# ruff: noqa: E501 (one message a line)
from __future__ import annotations

import pytest
import torch

import spdsl
from spdsl.codegen import render
from spdsl.diagnostics import Diagnostic, Severity


def shown(found: Diagnostic) -> str:
    return " | ".join([found.code, found.message, found.label, *found.notes, *(hint.text for hint in found.hints)])


def only(text: str, **params: int) -> str:
    (found,) = spdsl.check(f"pattern p {{ causal {text} }}", **params)
    return shown(found)


@pytest.mark.quick
@pytest.mark.parametrize(
    "text, wanted",
    [
        ("param window = 4 return attend(sliding(windw))", "E101 | unknown name `windw` | not bound here | did you mean `window`?"),
        ("return attend(slidng(4))", "E102 | unknown word `slidng` | no such word | did you mean `sliding`?"),
        ("a = sink(1) a = sink(2) return attend(a)", "E103 | `a` is bound twice | bound again here | first bound in line 1 | each name is bound once; choose another name"),
        ("gates = tensor(head) return attend(all, sink_logit = gates)", "E104 | `gates` cannot be bound | has a meaning of its own | choose another name"),
        ("far = stream() k_far = tensor(head) return attend(far, bias = k_far[h])", "E104 | `k_far` cannot name a tensor | taken | the generated module would have two `k_far`, the other from `far` | choose another name"),
        ("causal return attend(all)", "E106 | `causal` is written twice | again here | write it once"),
        ("near = sliding(4) return near", "E201 | a branch is expected here | not a branch | attend to the set: `attend(...)`"),
        ("a = attend(all) return merge(gate(a, a), a)", "E201 | a branch without gates is expected here | not a branch without gates | gate all branches together: `gate(a, b, c)`"),
        ("a = attend(all) return gate(a, a) if length < 9 return gate(a, a, a)", "E202 | gates of 2 and of 3 branches in one pattern | there is one argument `gates` for all of them | gate as many branches in each result, or write two patterns"),
        ("s = tensor(head) return attend(all, sink_logit = s, bias = s[h] * (q - k))", "E205 | `s` is the logit of the sink and is read in an expression, too | has a gradient here, and none there | declare two tensors, and pass the same one twice"),
        ("kv = 4 return attend(all)", "E201 | `kv` can be rebound to a stream only | not a stream | choose another name"),
        ("heads query = 64 kv = 4 return attend(all)", "E202 | a comma is missing before `kv` | reads as a binding, not as a part of `heads` | add `,`"),
        ("return attend(sliding(0))", "E203 | `n` is 0, it must be at least 1 | at least 1 is needed"),
        ("d = tensor(token) return attend(where(d[h] > 1))", "E204 | the axis `token` of `d` is read at another position | wrong kind of position | index it by `q` or `k`"),
        ("return attend(where(q))", "E205 | a condition is expected here | is a number | compare it: `... < ...`"),
        ("near = attend(sliding(4))", "E301 | pattern `p` returns nothing | no `return` | end it with `return attend(...)`"),
        ("return attend(sliding(4)) if q > 3", "E308 | a result's condition cannot depend on the position `q` | differs from query to query | conditions are about the phase, `length` and scalars; use `where` for positions"),
        ("return attend(sliding(4) & where(k > q))", "E305 | no query can ever see a key of this set | "),
        ("heads query = 3, kv = 2 return attend(all)", "E306 | 2 kv heads do not divide the 3 query heads | "),
        ("near = sliding(4) return attend(all)", "W107 | `near` is never used | bound here"),
        ("return attend(sliding(8) - sliding(4))", "W402 | the first queries see no key | their output is 0 | add the query's own token: `... | sliding(1)`"),
    ],
)  # fmt: skip
def test_messages(text: str, wanted: str) -> None:
    assert only(text) == wanted


def test_overrides() -> None:
    assert only("param n = 4 return attend(sliding(n))", n=0).startswith("E502 | `n` is 0")
    assert only("param n = 4 return attend(fixed(n, 3))", n=2).startswith("E502 | a block of 2")
    assert only("param n = 4 return attend(sliding(n))", m=2).startswith("E501 | pattern `p` has no parameter `m`")


def test_all_errors_of_a_file_in_one_run_and_no_warnings_after_them() -> None:
    text = """
pattern one {
    unused = sink(3)
    a = slidng(windw, ahed = 1)
    b = where(sink(2))
    return attend(a | c)
}
pattern two { return attend(sample(4)) }
"""
    found = spdsl.check(text)
    assert [one.code for one in found] == ["E102", "E101", "E202", "E205", "E101", "E105"]


TENSOR = "pattern p {{ {0} = tensor(token) causal return attend(sliding(9), bias = {0}[k]) }}"
SET = "pattern p {{ allow(W504) {0} = given(unit = 4, rows = 4) causal return attend(sliding(2) | {0}) }}"
STREAM = "pattern p {{ {0} = stream() causal return attend({0}[sliding(9)]) }}"
QUERY = "pattern p {{ {0} = query() causal return attend(sliding(9), query = {0}) }}"
BRANCH = "pattern p {{ {0} = attend(sliding(9)) causal return {0} }}"
NAMES = (
    "x y w t s m at row rows tile tiles block visit sequence sparse dense scale sink call source span mask read layout"
    " part parts sizes out lse dout first last end full total count index int list print keys values length_of"
    " local wide near far _a a_b attend gate member Cache tl Tensor K group delta LN2 by_class split position"
).split()


# For inputs: words of every module, but for streams, whose arguments have other names; no field of a named tuple.
WORDS, NO_FIELD = ("Cache", "rows"), ("_a",)


@pytest.mark.parametrize("start", [0, *(pytest.param(start, marks=pytest.mark.full) for start in range(1, 6))])
@pytest.mark.parametrize("form", [TENSOR, SET, STREAM, QUERY, BRANCH], ids="tensor set stream query branch".split())
def test_accepted_names_run(form: str, start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the module uses itself. Left unformatted, which takes a second less."""
    monkeypatch.setattr(render, "formatted", lambda made: made)
    for name in NAMES[start::6]:
        found = spdsl.check(form.format(name))
        refused = () if form is BRANCH else NO_FIELD if form is STREAM else WORDS + NO_FIELD
        if name in refused:
            assert {one.code for one in found} == {"E104"}, name
            continue
        assert [one.code for one in found if one.severity is Severity.ERROR] == [], name
        module = spdsl.load(form.format(name))
        torch.manual_seed(0)
        inputs = module.example_inputs(1, 12, heads=2, kv_heads=1, qk_dim=16, v_dim=16)
        torch.testing.assert_close(
            module.attention(**inputs).double(), module.reference(**inputs), atol=1e-4, rtol=1e-4, msg=name
        )
        cache = module.Cache(1, 64, kv_heads=1, qk_dim=16, v_dim=16, page=None)
        assert torch.isfinite(module.prefill(**inputs, cache=cache)).all(), name


@pytest.mark.parametrize(
    "body",
    [
        "x = given(unit = 4, rows = 4) x_first = tensor(head, int) return attend(x | where(x_first[h] == k))",
        "far = stream() k_far = tensor(head, int) return attend(far[where(k_far[h] == k)])",
        "far = stream() v_far = query() return attend(far, query = v_far)",
    ],
)
def test_two_inputs_with_one_argument(body: str) -> None:
    assert "E104" in [found.code for found in spdsl.check(f"pattern p {{ causal {body} }}")]
