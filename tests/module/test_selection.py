"""Modules that compress and select, as PyTorch sees them, and what they say of arguments that do not fit."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck

from tests.library import launches
from tests.module.patterns import arguments
from tests.module.test_operators import Recorded
from tests.numerics.patterns import module_of
from tests.numerics.selected import SELECTED, nsa

NAMES = ["nsa", "moba", "msa_minimax", "infllm_v2", "softmax", "two choices", "cells that begin early"]


@pytest.fixture(params=NAMES)
def selecting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return on_cpu(SELECTED[request.param], monkeypatch)


@pytest.fixture
def sparse(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return on_cpu(SELECTED["nsa"], monkeypatch)


def on_cpu(body: str, patch: pytest.MonkeyPatch) -> ModuleType:
    module = module_of(body)
    patch.setattr(launches(module), "KERNELS_ON_CPU", False)
    return module


def learned(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies that ask for gradients, but for integers."""
    return {name: x.clone().requires_grad_(x.is_floating_point()) for name, x in given.items()}


def total(answer: Any) -> Tensor:
    """One number of all results."""
    return answer.square().sum() if isinstance(answer, Tensor) else sum(total(part) for part in answer)


def gradients(function: Any, given: dict[str, Tensor]) -> dict[str, Tensor | None]:
    own = learned(given)
    total(function(**own)).backward()
    return {name: x.grad for name, x in own.items()}


def expect_same(module: ModuleType, compiled: Any, given: dict[str, Tensor]) -> None:
    """Results and gradients are bitwise those of the module."""
    found, wanted = compiled(**learned(given)), module.attention(**given)
    for x, y in zip(*((x,) if isinstance(x, Tensor) else x for x in (found, wanted)), strict=True):
        assert torch.equal(x, y)
    own, other = gradients(compiled, given), gradients(module.attention, given)
    for name, grad in other.items():
        assert grad is None or torch.equal(own[name], grad), name


def test_opcheck_of_every_operator(selecting: ModuleType) -> None:
    with Recorded(selecting) as found:
        gradients(selecting.attention, arguments(selecting))
    assert any("lists" in str(found.operator(name)._schema) for name in found.calls)
    for name, call in found.calls.items():
        given = [x.detach() if isinstance(x, Tensor) else x for x in call]
        assert set(opcheck(found.operator(name), given).values()) == {"SUCCESS"}


@pytest.mark.parametrize("layout", ["dense", "packed", "padded"])
def test_gradients_equal_finite_differences(sparse: ModuleType, layout: str) -> None:
    """The lists are fixed: a choice jumps where scores cross."""
    extra = {
        "dense": {},
        "packed": {"cu_seqlens": torch.tensor([0, 8, 20])},
        "padded": {"lengths": torch.tensor([17])},
    }[layout]
    given = arguments(sparse, 20, batch=1, heads=2, kv_heads=1, qk_dim=2, v_dim=1, dtype=torch.float64)
    chosen = torch.randint(-1, 2, (1, 1, 20, 2), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    names = list(given)

    def both(*values: Tensor) -> Tensor:
        own = dict(zip(names, values, strict=True))
        out, lse = sparse.attention(**own, chosen=chosen, return_lse=True, **extra)
        return torch.cat((out.flatten(), lse.masked_fill(lse.isinf(), 0).flatten()))

    assert torch.autograd.gradcheck(both, tuple(x.requires_grad_() for x in given.values()), fast_mode=True)


def test_one_graph_with_backward(selecting: ModuleType) -> None:
    compiled = torch.compile(selecting.attention, fullgraph=True, backend="aot_eager")
    expect_same(selecting, compiled, arguments(selecting))


@pytest.mark.parametrize("name", ["moba", pytest.param("nsa", marks=pytest.mark.full)])
def test_one_graph_for_all_lengths(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = on_cpu(SELECTED[name], monkeypatch)
    compiled = torch.compile(sparse.attention, fullgraph=True, backend="aot_eager", dynamic=True)
    # No two sizes are equal by chance: three branches have gates.
    expect_same(sparse, compiled, arguments(sparse, 112, batch=5))
    with torch.compiler.set_stance("fail_on_recompile"):
        expect_same(sparse, compiled, arguments(sparse, 144, batch=7))


class Layer(nn.Module):
    def __init__(self, module: ModuleType) -> None:
        super().__init__()
        self.attend = module.attention

    def forward(self, given: dict[str, Tensor]) -> Tensor:
        out: Tensor = self.attend(**given)
        return out


def test_export(sparse: ModuleType) -> None:
    given = arguments(sparse)
    exported = torch.export.export(Layer(sparse), (given,))
    assert torch.equal(exported.module()(given), sparse.attention(**given))
    assert any("chosen" in str(node.target) for node in exported.graph.nodes)


def test_meta_tensors_have_the_same_shapes(selecting: ModuleType) -> None:
    given = arguments(selecting)
    found = selecting.attention(**{name: x.to("meta") for name, x in given.items()})
    wanted = selecting.attention(**given)
    for x, y in zip(*((x,) if isinstance(x, Tensor) else x for x in (found, wanted)), strict=True):
        assert (x.device.type, x.shape, x.dtype) == ("meta", y.shape, y.dtype)


def test_two_modules_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (on_cpu(nsa(count=count, window=window), monkeypatch) for count, window in ((3, 9), (4, 20)))
    assert few.MODULE.namespace != many.MODULE.namespace
    given = arguments(few, 90)
    for module in (few, many, few):
        torch.testing.assert_close(module.attention(**given), module.reference(**given).float(), rtol=1e-4, atol=1e-4)
    assert not torch.equal(few.attention(**given), many.attention(**given))


def test_signature_and_examples(sparse: ModuleType) -> None:
    """Compressed streams are no arguments; what they learn is."""
    given = arguments(sparse)
    weights = [f"entries_{side}_{role}" for side in "kv" for role in ("position", "up", "down")]
    streams = [f"{side}_{name}" for side in "kv" for name in ("rough", "picked", "recent")]
    assert set(given) == {"q", "gates", *weights, *streams}
    assert all(gradients(sparse.attention, given)[name].abs().sum() > 0 for name in weights)


def zeros(*shape: int, **kind: Any) -> Tensor:
    return torch.zeros(shape, **kind)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"entries_k_position": None}, "entries_k_position: expected a tensor, got NoneType"),
    ({"entries_k_position": zeros(2, 8, 24)}, r"entries_k_position: expected \[2, 8, 16\], got \[2, 8, 24\]"),
    ({"entries_v_position": zeros(4, 8, 24)}, r"entries_v_position: expected \[2, 8, 24\], got \[4, 8, 24\]"),
    ({"entries_k_up": zeros(2, 9, 16, 5)}, r"entries_k_up: expected \[2, 8, 16, 'any'\], got \[2, 9, 16, 5\]"),
    ({"entries_k_down": zeros(2, 16)}, r"entries_k_down: expected \[2, 'any', 16\], got \[2, 16\]"),
    ({"entries_k_down": zeros(2, 32, 16, dtype=torch.int64)}, "entries_k_down: expected float16, .* got torch.int64"),
    ({"entries_v_up": zeros(2, 8, 24, 32, device="meta")}, "entries_v_up: expected device cpu, got meta"),
    ({"chosen": [1]}, "chosen: expected a tensor, got list"),
    ({"chosen": zeros(2, 2, 40, 3)}, "chosen: expected int32 or int64, got torch.float32"),
    ({"chosen": zeros(2, 2, 39, 3, dtype=torch.int32)}, r"chosen: expected \[2, 2, 40, units\], got \[2, 2, 39, 3\]"),
    ({"chosen": zeros(2, 4, 40, 3, dtype=torch.int32)}, r"chosen: expected \[2, 2, 40, units\], got \[2, 4, 40, 3\]"),
    ({"chosen": zeros(2, 2, 40, dtype=torch.int32)}, r"chosen: expected \[2, 2, 40, units\], got \[2, 2, 40\]"),
    ({"chosen": zeros(2, 2, 40, 3, dtype=torch.int32, device="meta")}, "chosen: expected device cpu, got meta"),
    ({"k_rough": zeros(2, 3, 40, 16)}, "k_rough: expected heads that divide the 4 of q, got 3"),
    ({"gates": zeros(2, 4, 40, 2)}, r"gates: expected shape \[2, 4, 40, 3\], got"),
    ({"q_offset": 4, "k_offset": 4}, "k_offset: expected 0"),
]


@pytest.mark.parametrize("changes, message", BAD, ids=[one[1][:40] for one in BAD])
def test_refused(sparse: ModuleType, changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {**arguments(sparse), **changes}
    for function in (sparse.attention, sparse.reference):
        if function is sparse.reference and "gates" in changes:
            continue  # the reference computes with them as they are
        with pytest.raises((ValueError, TypeError), match=f"^{message}"):
            function(**given)


def test_hidden_sizes_must_agree(sparse: ModuleType) -> None:
    given = {**arguments(sparse), "entries_k_down": zeros(2, 5, 16)}
    with pytest.raises((ValueError, RuntimeError)):
        sparse.attention(**given)
