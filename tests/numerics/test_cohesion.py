"""How alike the tokens of a cell are: choices by it are those of the definition, whatever the query."""

from __future__ import annotations

from math import inf, nan
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import spdsl
from spdsl.oracle.compress import compressed
from spdsl.runtime.pools.table import POOLS
from tests.library import broken
from tests.numerics.cases import Inputs, Shape, inputs_of
from tests.numerics.conftest import Engine
from tests.numerics.patterns import pattern_of, text_of
from tests.numerics.selected import expect_lists
from tests.numerics.test_selection import checked
from tests.numerics.test_selection_layouts import check_chunks, check_packed, check_padded
from tests.quick import quick

BODIES = {
    "of a group": "causal c = compress(8, 4) odd = threshold(-0.2, score = -cohesion(c), share = group, "
    "force = last(1), most = 3, unit = max(16)) return attend(odd)",
    "the least": "causal odd = top_k(2, score = cohesion(compress(16), by = min), share = head) return attend(odd)",
    "beside a branch": "causal c = compress(8, 4, before = 4) coarse = attend(c) "
    "odd = top_k(2, score = cohesion(c) + 0.1 * cosine(c), share = max(group), unit = max(16)) "
    "return gate(coarse, attend(odd))",
    "a short cell": "odd = top_k(2, score = cohesion(compress(16, partial = keep)), share = group, rows = 8) "
    "return attend(odd) if train",
    "another stream": "far = stream() odd = threshold(0.1, score = cohesion(compress(8, of = far)), share = group, "
    "unit = mean(16), least = 1, most = 2) return attend(far[odd])",
}


@pytest.mark.parametrize("name", quick(BODIES, ["of a group"]))
def test_lists_and_results(engine: Engine, name: str) -> None:
    if engine.name == "interpreted" and name not in ("of a group", "beside a branch"):
        pytest.skip("the same kernels in fewer patterns")
    shape = Shape(18, 59, 1, 4, 2) if engine.name == "interpreted" else Shape(33, 83, 2, 4, 2)
    checked(BODIES[name], shape, engine(BODIES[name]), backward=engine.name == "cpu")


@pytest.mark.parametrize("name", ["of a group", "a short cell"])
def test_packed_and_padded(engine: Engine, name: str) -> None:
    if engine.name == "interpreted" and name != "of a group":
        pytest.skip("the same kernels in fewer patterns")
    check_packed(BODIES[name], engine(BODIES[name]), [0, 21, 21, 22, 38])
    check_padded(BODIES[name], engine(BODIES[name]), [21, 0, 18])


@pytest.mark.parametrize("name", ["of a group", "the least"])
def test_chunks_and_steps(engine: Engine, name: str) -> None:
    check_chunks(BODIES[name], engine(BODIES[name]), 16, [17], 2, 2)


def of_keys(body: str, case: str) -> Inputs:
    inputs = inputs_of(pattern_of(body), Shape(24, 60, 1, 4, 2))
    k = inputs["k"]
    if case == "equal":
        k.copy_(k[:, :, :1].expand_as(k))
    elif case == "zeros":
        k[:, :, 16:20] = 0
    elif case == "spike":
        k[:, :, 21] *= 300
    else:
        k[:, 0, 21] = inf if case == "inf" else nan
    return inputs


@pytest.mark.parametrize("case", ["equal", "zeros", "spike", "inf", "nan"])
@pytest.mark.parametrize("name", ["of a group", "the least"])
def test_unusual_keys(cpu: Engine, name: str, case: str) -> None:
    body = BODIES[name].replace("-0.2", "-0.5")
    inputs = of_keys(body, case)
    expect_lists(cpu(body).choices(**inputs), pattern_of(body), inputs)


def test_numbers_by_hand() -> None:
    """Of directions (1, 0), (0, 1), (1, 0) and a zero: pairs 1, 0, 1, 0 / 0, 1, 0, 0 / ..; with the mean (2, 1) / 4."""
    x = torch.tensor([[3.0, 0], [0, 2], [5, 0], [0, 0]]).double().view(1, 1, 1, 4, 2)
    assert POOLS["cohesion_mean"].entries(x, None)[0, 0, 0].tolist() == pytest.approx([5 / 16, 0])
    least = 2 / (8**2 + 2**2) ** 0.5
    assert POOLS["cohesion_min"].entries(x[:, :, :, :3], None)[0, 0, 0].tolist() == pytest.approx([least, 0])
    assert POOLS["cohesion_min"].entries(x, None)[0, 0, 0].tolist() == [0, 0]


@pytest.mark.parametrize("name", ["cohesion_mean", "cohesion_min"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sixteen_digits_are_kept(name: str, dtype: torch.dtype) -> None:
    (stream,) = [
        one for one in pattern_of(BODIES["of a group"] if "mean" in name else BODIES["the least"]).inputs
        if getattr(one, "compress", None) is not None and one.compress.by == name
    ]  # fmt: skip
    k = torch.randn(1, 2, 64, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    width, stride = stream.grid.width, stream.grid.stride
    found = POOLS[name].entries(k.unfold(2, width, stride).transpose(3, 4), None).double().sum(-1)
    wanted = compressed(stream, "k", k.double(), None, {}).sum(-1)
    assert (found - wanted).abs().max() < 2**-15


class Bug(NamedTuple):
    what: str
    name: str
    old: str
    new: str


BUGS = [
    Bug("tokens are not made directions", "of a group", "directions_of(c).sum(3)", "c.sum(3)"),
    Bug("tokens that are not there are counted", "a short cell", "there.sum(2).unsqueeze(1)",
        "torch.full_like(c[:, :, :, 0, 0], c.shape[3])"),
    Bug("the greatest", "the least", "cosines.amin(3)", "cosines.amax(3)"),
]  # fmt: skip


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.what)
def test_a_bug_is_seen(cpu: Engine, bug: Bug, tmp_path: Path) -> None:
    body = BODIES[bug.name]
    module, pattern = cpu(broken(spdsl.compile(text_of(body)).text, bug.old, bug.new, tmp_path)), pattern_of(body)
    found = []
    for seed in range(4):
        inputs = inputs_of(pattern, Shape(33, 58, 2, 4, 2, seed=seed))
        try:
            expect_lists(module.choices(**inputs), pattern, inputs)
        except AssertionError:
            found.append(seed)
    assert found


REFUSED = [
    ("cohesion(kv)", "E201", "has tokens"),
    ("cohesion(compress(16, by = max), by = min)", "E105", "by `max`"),
    ("cohesion(q)", "E201", "a stream"),
]


@pytest.mark.parametrize("score, code, message", REFUSED)
def test_what_is_refused(score: str, code: str, message: str) -> None:
    found = spdsl.check(
        text_of(f"chosen = top_k(2, score = {score}, share = group, unit = max(16)) return attend(chosen)")
    )
    assert [(one.code, message in one.message) for one in found if one.code.startswith("E")] == [(code, True)]


def test_it_is_no_way_to_compress() -> None:
    found = spdsl.check(text_of("return attend(compress(16, by = cohesion_mean))"))
    assert [one.code for one in found if one.code.startswith("E")]
