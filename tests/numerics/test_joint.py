"""Merges that are one operator, in every place that a result has for them; and results of several kinds."""

from __future__ import annotations

import pytest
import torch

from tests.numerics.cases import Found, Shape, assert_same, checked, generated, inputs_of, meant, parts_of
from tests.numerics.conftest import Engine
from tests.numerics.patterns import pattern_of

AB = "causal a = attend(sliding(7)) b = attend(sink(3) - sliding(7)) "
CD = "c = attend(sliding(5)) d = attend(sink(2) - sliding(5)) "
JOINTS = {
    "three parts": AB + "return merge(a, merge(b, attend(all - sliding(7) - sink(3))))",
    "in a gate": AB + CD + "return gate(merge(a, b), c)",
    "two results": AB + CD + "return merge(a, b), merge(c, d)",
    "sinks in each part": (
        "causal s = tensor(head) z = tensor(head) return merge(attend(sliding(7), sink_logit = s), "
        "attend(all - sliding(7), sink_logit = z))"
    ),
    "queries of their own": (
        "causal far = query() return merge(attend(sliding(7)), attend(all - sliding(7), query = far, softcap = 3))"
    ),
    "streams of their own, one with values for keys": (
        "causal far = stream(value = key) late = stream() "
        "return merge(attend(far[sliding(7)] | kv[sink(2) - sliding(7)]), attend(late[all]))"
    ),
}


@pytest.mark.parametrize("name", JOINTS)
def test_a_joint_is_what_its_parts_mean(engine: Engine, name: str) -> None:
    body, rows = JOINTS[name], 19 if engine.name == "interpreted" else 41
    module = engine(body)
    checked(body, Shape(rows, rows + 6, heads=2, kv_heads=1), module=module)


@pytest.mark.parametrize("name", ["two results", "in a gate"])
def test_the_reference_of_a_joint(cpu: Engine, name: str) -> None:
    """It has the parts, and merges them as it goes."""
    module, pattern = cpu(JOINTS[name]), pattern_of(JOINTS[name])
    inputs = inputs_of(pattern, Shape(20, 20))
    found = Found(parts_of(module.reference(**inputs, return_lse=True)))
    assert_same(found, meant(pattern, inputs, backward=False))


@pytest.mark.parametrize("result", ["merge({})", "gate({})"])
def test_values_of_two_dims_are_no_one_result(engine: Engine, result: str) -> None:
    body = "causal a = stream(v = 8) b = stream(v = 16) return " + result.format(
        "attend(a[sliding(8)]), attend(b[sink(2) - sliding(8)])"
    )
    module, pattern = engine(body), pattern_of(body)
    shape = Shape(9, 9, v=8)
    inputs = inputs_of(pattern, shape)
    with pytest.raises(ValueError, match="v_b: expected head dim 8 like v_a, got 16"):
        module.attention(**inputs)


MIXED = AB + "return attend(all) if length < 14 return gate(merge(a, b), attend(sliding(9)))"


def test_a_gated_result_beside_one_without_gates(engine: Engine) -> None:
    """Each sequence gets its own; its lse has a column for each branch."""
    module, pattern = engine(MIXED), pattern_of(MIXED)
    inputs = inputs_of(pattern, Shape(30, 30, batch=1))
    ends = [0, 17, 30]
    ((out, lse),) = generated(module, pattern, inputs, {"cu_seqlens": torch.tensor(ends)}, backward=False).parts
    assert lse.shape[-1] == 2
    for first, end in ((0, 17), (17, 30)):
        own = {key: x[:, :, first:end] for key, x in inputs.items()}
        ((wanted, wanted_lse),) = meant(pattern, own, backward=False).parts
        assert_same(Found([(out[:, :, first:end], lse[:, :, first:end])]), Found([(wanted, wanted_lse)]))
