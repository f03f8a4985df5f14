"""Scores made of others: sums, multiples, `relative` and `smooth`; choices by them are those of the definition."""

from __future__ import annotations

from math import inf, nan
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

import spdsl
from tests.library import broken
from tests.numerics.cases import Shape, inputs_of
from tests.numerics.conftest import Engine
from tests.numerics.patterns import pattern_of, text_of
from tests.numerics.selected import expect_lists
from tests.numerics.test_selection import checked
from tests.numerics.test_selection_layouts import check_chunks, check_packed, check_padded
from tests.quick import quick
from tests.sanitizer.mode import sanitized

TWO = "causal far = stream() a = compress(8, 4) b = compress(8, 4, of = far) "
ONE = "causal a = compress(16) "
BODIES = {
    "a sum": TWO + "x = 0.5 * dot(a) - 3 * cosine(b) chosen = top_k(2, score = x, share = max(group), "
    "unit = max(16), force = last(1)) return attend(chosen)",
    "a difference of masses": TWO + "coarse = attend(a) x = mass(coarse) - softmax(dot(b)) / 2 "
    "chosen = threshold(0, score = x, share = sum(group), unit = sum(16), most = 3, least = 1) "
    "return gate(coarse, attend(chosen))",
    "the least alike": ONE + "chosen = threshold(-0.1, score = -cosine(a), share = head, least = 1, force = last(1)) "
    "return attend(chosen)",
    "relative": ONE + "chosen = threshold(-0.2, score = relative(dot(a)), share = head, "
    "within = where(k >= 16 & k < q)) return attend(chosen | sliding(5))",
    "relative of a group": "a = compress(8, 4, before = 4) chosen = threshold(-0.3, score = relative(dot(a)), "
    "share = mean(group), rows = mean(8), unit = max(16), within = ~first(1), most = 4) return attend(chosen)",
    "smooth": ONE + "x = smooth(softmax(dot(a)), 3) chosen = top_k(2, score = x, share = sum(group), "
    "within = ~last(1), force = first(1)) return attend(chosen | last(1, unit = 16))",
    "the greatest around": TWO + "x = smooth(dot(a) + dot(b), 5, by = max) chosen = top_p(0.6, score = smooth("
    "softmax(dot(a)), 3), share = head, unit = sum(16), least = 1) "
    "other = top_k(2, score = x, share = max(group), unit = max(16)) return gate(attend(chosen), attend(other))",
    "all words": "x = tensor(head) "
    "s = smooth(antidiagonal(4), 3, by = max) - 0.5 * relative(2 * antidiagonal(4)) chosen = threshold(x[h], "
    "score = s, share = head, rows = mean(8), unit = mean(16), least = 1, most = 3) return attend(chosen)",
}
FEW = ("a sum", "relative", "all words")


@pytest.mark.parametrize("name", quick(BODIES, ["a sum"]))
def test_lists_and_results(engine: Engine, name: str) -> None:
    if engine.name == "interpreted" and name not in FEW:
        pytest.skip("the same kernels in fewer patterns")
    shape = Shape(18, 52, 1, 4, 2) if engine.name == "interpreted" else Shape(33, 83, 2, 4, 2)
    checked(BODIES[name], shape, engine(BODIES[name]), backward=engine.name == "cpu")


@pytest.mark.parametrize("name", ["a sum", "smooth", "relative of a group", "all words"])
def test_packed_and_padded(engine: Engine, name: str) -> None:
    if engine.name == "interpreted" and name != "a sum":
        pytest.skip("the same kernels in fewer patterns")
    check_packed(BODIES[name], engine(BODIES[name]), [0, 21, 21, 22, 38])
    check_padded(BODIES[name], engine(BODIES[name]), [21, 0, 18])


@pytest.mark.parametrize("name", ["a sum", "a difference of masses", "relative", "smooth"])
def test_chunks_and_steps(engine: Engine, name: str) -> None:
    if engine.name == "interpreted" and name != "a sum":
        pytest.skip("the same kernels in fewer patterns")
    check_chunks(BODIES[name], engine(BODIES[name]), 16, [17], 2, 2)


@pytest.mark.parametrize("case", ["equal", "spike", "-inf", "nan", "nan of a key", "tie"])
@pytest.mark.parametrize("name", ["a sum", "relative", "smooth"])
def test_unusual_scores(engine: Engine, name: str, case: str) -> None:
    if engine.name == "interpreted" and (name != "relative" or case not in ("nan", "-inf")):
        pytest.skip("the same kernels in fewer cases")
    module, pattern = engine(BODIES[name]), pattern_of(BODIES[name])
    inputs = inputs_of(pattern, Shape(24, 60, 1, 4, 2))
    q, k = inputs["q"], inputs["k"]
    if case in ("equal", "tie"):
        (q if case == "equal" else k).zero_()
    elif case == "spike":
        k[:, :, 21] *= 300
    elif case == "-inf":
        k[:, :, 17:25] = -inf
        q.abs_().add_(0.1)
    elif case == "nan":
        q[:, 1, 20] = nan
    else:
        k[:, 0, 9] = nan
    expect_lists(module.choices(**inputs), pattern, inputs)


def test_smoothed_by_hand(engine: Engine) -> None:
    """Scores 8, 0, 4, 6 of four closed units, the third no candidate: means of three 8/3, 8/3, -, 2."""
    body = (
        "causal index = stream(value = none) u = compress(16, of = index) x = smooth(dot(u, scale = 1), 3) chosen = "
        "threshold(2.1, score = x, share = head, within = where(k // 16 != 2), least = 0) return attend(chosen)"
    )
    pattern = pattern_of(body)
    inputs = inputs_of(pattern, Shape(1, 70, 1, 1))
    inputs["q"], inputs["k_index"] = torch.zeros_like(inputs["q"]), torch.zeros_like(inputs["k_index"])
    inputs["q"][..., 0] = 1
    inputs["k_index"][0, 0, :64, 0] = torch.tensor([8.0, 0, 4, 6]).double().repeat_interleave(16)
    assert [unit for unit in engine(body).choices(**inputs)["chosen"][0, 0, 0].tolist() if unit >= 0] == [0, 1]
    expect_lists(engine(body).choices(**inputs), pattern, inputs)


class Bug(NamedTuple):
    what: str
    name: str
    old: str
    new: str


BUGS = [
    Bug("absent entries are left out of a mean", "smooth", ".sum(-1) / width",
        ".sum(-1) / torch.nn.functional.pad(scores.seen.double(), (room, room)).unfold(-1, width, 1).sum(-1)"),
    Bug("what is no candidate is smoothed in", "smooth", "none = none | ~_candidates", "none = none & ~_candidates"),
    Bug("the greatest of all, candidates or not", "relative", "none = none | ~_candidates",
        "none = none & ~_candidates"),
    Bug("a number where one part has none", "a sum", "value + weight * part.value", "value + part.value"),
    Bug("less the greatest of other rows", "relative", "amax(-1, keepdim=True)", "amax((-1, -2), keepdim=True)"),
]  # fmt: skip


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.what)
def test_a_bug_is_seen(cpu: Engine, bug: Bug, tmp_path: Path) -> None:
    body = BODIES[bug.name]
    module = cpu(broken(spdsl.compile(text_of(body)).text, bug.old, bug.new, tmp_path))
    with pytest.raises(AssertionError):
        expect_several(module, body)


@pytest.mark.parametrize("bug", [
    Bug("queries of other tiles", "a sum", "own.data + place", "own.data + place * 0"),
    Bug("rows that are not there are seen", "all words", "< last[:, None])", "< last[:, None] + 16)"),
    Bug("entries behind the last", "all words", "key < keys.count", "key < keys.count - 1"),
], ids=lambda bug: bug.what)  # fmt: skip
def test_a_bug_of_kernels_is_seen(kernels: Engine, bug: Bug, tmp_path: Path) -> None:
    body = BODIES[bug.name]
    module = kernels(broken(spdsl.compile(text_of(body)).text, bug.old, bug.new, tmp_path))
    with sanitized(), pytest.raises(AssertionError):
        expect_several(module, body)


def expect_several(module: ModuleType, body: str) -> None:
    pattern = pattern_of(body)
    for seed in range(3):
        inputs = inputs_of(pattern, Shape(21, 75, 2, 4, 2, seed=seed))
        expect_lists(module.choices(**inputs), pattern, inputs)


REFUSED = [
    ("x = dot(a) + dot(kv)", "E201", "other entries"),
    ("x = dot(a) + 1", "E201", "a score is expected"),
    ("x = dot(a) * dot(a)", "E201", "multiplied by a number"),
    ("x = dot(a) / 0", "E203", "divided by 0"),
    ("x = dot(a) // 2", "E201", "no `//`"),
    ("x = smooth(dot(a), 4)", "E203", "no middle"),
    ("x = softmax(dot(a) + dot(a))", "E105", "made of others"),
    ("x = dot(a) + mass(attend(a, softcap = 2))", "E105", "a cap"),
    ("x = antidiagonal(16, a)", "E201", "of tokens"),
    ("x = antidiagonal(16) + dot(a)", "E201", "other entries"),
]


@pytest.mark.parametrize("binding, code, message", REFUSED)
def test_what_is_refused(binding: str, code: str, message: str) -> None:
    body = f"a = compress(16) {binding} chosen = top_k(2, score = x, share = head) return attend(chosen)"
    found = spdsl.check(text_of(body))
    assert [(one.code, message in one.message) for one in found if one.code.startswith("E")] == [(code, True)]


@pytest.mark.parametrize("score", ["dot(a) + dot(a)", "softmax(dot(a)) + softmax(dot(a))", "-softmax(dot(a))"])
def test_what_is_no_probability(score: str) -> None:
    body = f"a = compress(16) chosen = top_p(0.5, score = {score}, share = head) return attend(chosen)"
    assert "E206" in {one.code for one in spdsl.check(text_of(body))}
