"""Patterns that compress and choose, on a GPU: with the same lists passed in, kernels against the float64 meaning.

Forward, all gradients, prefill in two chunks and steps of decode; and the module's own lists against scores in float64.
"""

from __future__ import annotations

import re
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import spdsl
from benchmarks.gpu.patterns import DEVICE, FOLDER
from benchmarks.nsa import cases, checks
from benchmarks.nsa.inputs import lists

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]

Inputs = dict[str, Tensor]
SMALL: dict[str, dict[str, int]] = {
    "nsa": {"width": 8, "stride": 4, "block": 16, "count": 4, "window": 20},
    "infllm_v2": {"block": 32, "count": 3, "local": 2},
    "moba": {"block": 32, "count": 3},
    "msa_minimax": {"block": 16, "count": 4},
}
MEDIUM: dict[str, dict[str, int]] = {
    "nsa": {},
    "infllm_v2": {"count": 8, "local": 4},
    "moba": {"block": 256, "count": 4},
    "msa_minimax": {"count": 8},
}
# Relative to the largest value, in norm: a few roundings of the type (fp32 products are three tf32 ones).
LIMITS = {"bfloat16": 2e-2, "float16": 3e-3, "float32": 1e-4}


def module_of(name: str, params: dict[str, int], heads: int, kv_heads: int, dim: int, v_dim: int) -> ModuleType:
    text = (FOLDER / f"{name}.spat").read_text()
    text = re.sub(r"\n +(heads|dim) .*", "", text).replace("length < 8192", "length < 24")
    text = text.replace("{\n", f"{{\n    heads query = {heads}, kv = {kv_heads}\n    dim qk = {dim}, v = {v_dim}\n", 1)
    text = re.sub(r"query\(heads = 4, dim = 128\)", f"query(heads = {kv_heads}, dim = {dim})", text)
    text = re.sub(r"heads = 1, qk = 128", f"heads = 1, qk = {dim}", text)
    return spdsl.load(text, **params)


def arguments(module: ModuleType, batch: int, tokens: int, dtype: str) -> tuple[Inputs, Tensor]:
    """Inputs and lists [1, lists, tokens, count]."""
    torch.manual_seed(0)
    given: Inputs = module.example_inputs(batch, tokens, dtype=getattr(torch, dtype), device=DEVICE)
    per_head = module.PATTERN == "moba"
    heads = next(
        x for name, x in given.items() if name == ("q" if per_head else "k" if "k" in given else "k_rough")
    ).shape[1]
    return given, lists(tokens, heads, module.PARAMS["block"], module.PARAMS["count"], clustered=True)


def first(result: Any) -> Tensor:
    """The output where there are further results."""
    found = result[0] if isinstance(result, tuple) else result
    assert isinstance(found, Tensor)
    return found


def near(found: Tensor, want: Tensor, dtype: str, name: str) -> None:
    error = (found.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)
    assert error <= LIMITS[dtype], f"{name}: {error:.2e}"


def expect_both_ways(module: ModuleType, batch: int, tokens: int, dtype: str) -> None:
    given, chosen = arguments(module, batch, tokens, dtype)
    leaves = {name: x.requires_grad_(x.is_floating_point()) for name, x in given.items()}
    names = [name for name, x in leaves.items() if x.requires_grad]
    found, want = first(module.attention(**leaves, chosen=chosen)), first(module.reference(**leaves, chosen=chosen))
    near(found.detach(), want.detach(), dtype, "out")
    dout = torch.randn_like(want)
    grads = [
        torch.autograd.grad(out, [leaves[name] for name in names], dout.to(out.dtype), allow_unused=True)
        for out in (found, want)
    ]
    for name, own, other in zip(names, *grads, strict=True):
        assert (own is None) <= (other is None or not bool(other.any())), name
        if own is not None and other is not None and bool(other.any()):
            near(own, other, dtype, name)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", SMALL)
def test_forward_and_backward_with_given_lists(name: str, dtype: str) -> None:
    expect_both_ways(module_of(name, SMALL[name], 4, 2, 32, 32), 2, 131, dtype)


@pytest.mark.parametrize("dims", [(128, 128), (192, 128)])
@pytest.mark.parametrize("name", MEDIUM)
def test_forward_and_backward_at_medium_sizes(name: str, dims: tuple[int, int]) -> None:
    expect_both_ways(module_of(name, MEDIUM[name], 32, 2, *dims), 1, 2048 + 67, "bfloat16")


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 2), (6, 2), (10, 2), (16, 1), (32, 2)])
def test_any_group_of_heads(heads: int, kv_heads: int) -> None:
    expect_both_ways(module_of("nsa", SMALL["nsa"], heads, kv_heads, 64, 64), 1, 259, "float16")


@pytest.mark.parametrize("dims", [(24, 24), (80, 80), (96, 96), (192, 192)])
def test_head_dims(dims: tuple[int, int]) -> None:
    expect_both_ways(module_of("nsa", SMALL["nsa"], 8, 2, *dims), 1, 259, "float16")


@pytest.mark.parametrize("tokens", [1, 7, 8, 15, 16, 17, 31, 33, 63, 65])
def test_lengths_around_the_cells_and_units(tokens: int) -> None:
    expect_both_ways(module_of("nsa", SMALL["nsa"], 4, 2, 32, 32), 1, tokens, "float32")


@pytest.mark.parametrize("page", [64, None])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", SMALL)
def test_prefill_and_decode_with_given_lists(name: str, dtype: str, page: int | None) -> None:
    module, tokens = module_of(name, SMALL[name], 4, 2, 32, 32), 131
    given, chosen = arguments(module, 1, tokens, dtype)
    want = first(module.reference(**given, chosen=chosen))
    store = module.Cache(1, tokens + 5, page=page, dtype=getattr(torch, dtype), device=DEVICE)
    for start, end in pairwise([0, 64, 97, *range(98, tokens + 1)]):
        part = {key: x[:, :, start:end] if x.dim() == 4 and x.shape[2] == tokens else x for key, x in given.items()}
        step = module.decode if end - start == 1 else module.prefill
        found = first(step(**part, chosen=chosen[:, :, start:end], cache=store))
        near(found, want[:, :, start:end], dtype, f"rows {start} to {end}")


@pytest.mark.parametrize("lists", ["random", "clustered", "own"])
def test_nsa_passes_the_checks_of_its_suite(lists: str) -> None:
    case = cases.shapes(False, [2048 + 67])[0] | {"lists": lists}
    found = checks.attended(case)
    assert found["ok"], found["shares"]


@pytest.mark.parametrize("tokens", [100, 4096 + 67])
def test_nsa_chooses_the_best_units(tokens: int) -> None:
    found = checks.selected(cases.shapes(False, [tokens])[0])
    assert found["ok"], found


def test_thirty_runs_give_the_same_bits() -> None:
    module = module_of("nsa", SMALL["nsa"], 16, 2, 64, 64)
    given, _ = arguments(module, 1, 515, "bfloat16")
    leaves = {name: x.requires_grad_() for name, x in given.items()}
    token_inputs = [leaves[name] for name in leaves if name[:2] in ("q", "k_", "v_")]

    def run() -> list[Tensor]:
        out = module.attention(**leaves)
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), token_inputs)]

    before = run()
    for _ in range(29):
        assert all(torch.equal(a, b) for a, b in zip(before, run(), strict=True))


@pytest.mark.parametrize("dtype", LIMITS)
def test_a_divergence_and_its_gradients(dtype: str) -> None:
    module = module_of("msa_minimax", SMALL["msa_minimax"], 8, 2, 64, 64)
    given, chosen = arguments(module, 2, 195, dtype)
    leaves = {name: x.requires_grad_() for name, x in given.items()}
    learned = [leaves["q_index"], leaves["k_index"]]
    (_, found), (_, want) = module.attention(**leaves, chosen=chosen), module.reference(**leaves, chosen=chosen)
    near(found.detach(), want.detach(), dtype, "kl")
    pairs = (torch.autograd.grad(kl.double().sum(), learned) for kl in (found, want))
    for name, own, other in zip(("q_index", "k_index"), *pairs, strict=True):
        near(own, other, dtype, name)


@pytest.mark.parametrize("page", [64, None])
def test_requests_of_which_different_results_answer(page: int | None) -> None:
    """One long and one short: programs of the result that does not answer return at once."""
    module, long, short = module_of("infllm_v2", SMALL["infllm_v2"], 8, 2, 64, 64), 131, 9
    given, chosen = arguments(module, 2, long, "float16")
    store = module.Cache(2, long + 5, page=page, dtype=torch.float16, device=DEVICE)
    module.prefill(**{name: x[:, :, : long - short] for name, x in given.items()}, cache=store)
    store.reset([1])
    for row in range(short):
        place = long - short + row
        step = {name: x[:, :, place : place + 1] for name, x in given.items()}
        found = first(module.decode(**step, chosen=chosen[:, :, place : place + 1].expand(2, -1, -1, -1), cache=store))
        whole = {name: x[:1, :, : place + 1] for name, x in given.items()}
        anew = {name: x[1:, :, long - short : place + 1] for name, x in given.items()}
        near(
            found[:1], first(module.reference(**whole, chosen=chosen[:, :, : place + 1]))[:, :, -1:], "float16", "long"
        )
        near(found[1:], first(module.reference(**anew))[:, :, -1:], "float16", "short")
