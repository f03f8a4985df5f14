"""Lists of units that the caller gives for single queries, as an argument: what is taken, refused, and compiled."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import spdsl
from tests.module.patterns import arguments
from tests.module.test_compiled import expect_same
from tests.module.test_operators import Recorded

BODIES = {
    "tokens": "causal near = given(most = 12) return attend(near)",
    "heads": "causal near = given(unit = 6, share = head) return attend(near)",
    "chosen": (
        "causal near = given(most = 12) "
        "far = top_k(2, score = dot(compress(8)), share = max(group), force = last(1)) "
        "return gate(attend(near), attend(far))"
    ),
}


@cache
def module_of(name: str) -> ModuleType:
    return spdsl.load(f"pattern lists_{name} {{ {BODIES[name]} }}")


@pytest.mark.parametrize("name", BODIES)
def test_opcheck_of_every_operator(name: str) -> None:
    module = module_of(name)
    given = arguments(module)
    own = {key: x.requires_grad_(x.dim() == 4 and x.is_floating_point()) for key, x in given.items()}
    with Recorded(module) as seen:
        module.attention(**own).square().sum().backward()
    assert len(seen.calls) >= 2
    for name, found in seen.calls.items():
        own_arguments = [x.detach() if isinstance(x, Tensor) else x for x in found]
        for x in own_arguments:
            if name.endswith("_forward") and isinstance(x, Tensor) and x.dim() == 4 and x.is_floating_point():
                x.requires_grad_()
        assert set(opcheck(seen.operator(name), own_arguments).values()) == {"SUCCESS"}, name


@pytest.mark.parametrize("name", BODIES)
def test_one_graph_for_all_lengths(name: str) -> None:
    module = module_of(name)
    compiled = torch.compile(module.attention, fullgraph=True, backend="aot_eager", dynamic=True)
    expect_same(module, compiled, arguments(module, 112, batch=3))
    with torch.compiler.set_stance("fail_on_recompile"):
        expect_same(module, compiled, arguments(module, 80, batch=5))  # whole cells again


def test_a_list_is_a_set() -> None:
    """In any order, with repeats, -1 anywhere, numbers past the end; int32 or int64, one for all rows and heads."""
    module = spdsl.load(f"pattern p {{ {BODIES['tokens'].replace('12', '40')} }}")
    given = arguments(module, 20)
    near = given.pop("near")
    wanted = module.attention(**given, near=near)
    none = torch.full_like(near[..., :1], -1)
    more = [near, near.flip(-1), none - 7, near[..., :1], none, near + 20 * (near >= 0) - (near < 0) * 3]
    for other in (
        torch.cat(more, -1),
        near.flip(-1).long(),
        torch.cat([none, near[..., torch.randperm(near.shape[3])]], -1),
    ):
        assert torch.equal(module.attention(**given, near=other), wanted)
    one = near[:1, :1]
    assert torch.equal(
        module.attention(**given, near=one), module.attention(**given, near=one.expand(2, 2, -1, -1).contiguous())
    )


@pytest.mark.parametrize("step", ["attention", "prefill", "decode", "reference", "choices"])
def test_what_is_refused(step: str) -> None:
    module = module_of("chosen")
    given = arguments(module, 1 if step == "decode" else 9)
    call: dict[str, Any] = {}
    if step in ("prefill", "decode"):
        call["cache"] = module.Cache(2, 20, kv_heads=2, qk_dim=16, v_dim=24, device="cpu", dtype=torch.float32)
    near, run = given.pop("near").long(), getattr(module, step)
    rows = near.shape[2]
    wide = torch.arange(13).expand(2, 2, rows, -1)
    for other, wrong in (
        (wide, "at most 12 units in a list, got 13"), (near.double(), "int32 or int64"), (near[:, :, :0], r"\[2, 2, "),
        (near[0], r"\[2, 2, "), (torch.cat([near] * 2, 1), r"\[2, 2, "), (torch.cat([near] * 2, 0), r"\[2, 2, "),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"^near: expected .*{wrong}"):
            run(**given, near=other, **call)
    for other in (None, [[1]], 3):
        with pytest.raises(TypeError, match=r"^near\b"):
            run(**given, near=other, **call)
    if call:
        assert call["cache"].lengths.tolist() == [0, 0]


def test_packed_sequences_have_a_list_for_each_token() -> None:
    module = module_of("tokens")
    given = arguments(module, 21, batch=1)
    packed = module.attention(**given, cu_seqlens=torch.tensor([0, 8, 21]))
    parts = [
        module.attention(**{name: x[:, :, first:end] for name, x in given.items()}) for first, end in ((0, 8), (8, 21))
    ]
    torch.testing.assert_close(packed, torch.cat(parts, 2))
