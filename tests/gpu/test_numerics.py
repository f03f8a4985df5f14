"""Generated kernels on a GPU: every pattern, dtype and layout against the float64 meaning; repeatability; size."""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import spdsl
from benchmarks.gpu import numerics, timing
from benchmarks.gpu.patterns import DEVICE, NAMES, Case, cache, differentiable, inputs, load

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]

SHAPE: Case = {"batch": 2, "heads": 8, "kv_heads": 2, "dim": 64, "tokens": 1027, "dtype": "bfloat16"}
DTYPES = ("bfloat16", "float16", "float32")
WINDOWS: dict[str, dict[str, int]] = {"sliding_window": {"window": 300}, "streaming_llm": {"window": 200}}


def case(pattern: str, **changes: Any) -> Case:
    return SHAPE | {"pattern": pattern, "params": WINDOWS.get(pattern, {})} | changes


def passes(found: Case) -> None:
    assert found["ok"], found["shares"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", NAMES)
def test_forward_and_backward_agree_with_the_meaning(pattern: str, dtype: str) -> None:
    passes(numerics.numerics(case(pattern, dtype=dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", NAMES)
def test_prefill_and_decode_agree_with_the_meaning(pattern: str, dtype: str) -> None:
    passes(numerics.cached(case(pattern, dtype=dtype, page=64)))
    passes(numerics.cached(case(pattern, dtype=dtype, page=None)))


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (10, 2), (16, 1), (32, 2)])
@pytest.mark.parametrize("pattern", ["streaming_llm", "block_sparse"])
def test_any_group_of_heads(pattern: str, heads: int, kv_heads: int) -> None:
    shape = case(pattern, heads=heads, kv_heads=kv_heads, tokens=515)
    passes(numerics.numerics(shape))
    passes(numerics.cached(shape))


@pytest.mark.parametrize(
    "dim, v_dim", [(16, 16), (24, 24), (32, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_dims(dim: int, v_dim: int, dtype: str) -> None:
    shape = case("streaming_llm", dim=dim, v_dim=v_dim, dtype=dtype, tokens=515)
    passes(numerics.numerics(shape))
    passes(numerics.cached(shape))


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 257])
def test_lengths_around_the_blocks(tokens: int) -> None:
    passes(numerics.numerics(case("streaming_llm", params={"window": 40}, tokens=tokens)))


@pytest.mark.parametrize("pattern", ["causal", "streaming_llm", "document", "prefix_lm"])
def test_packed_sequences_are_separate_runs(pattern: str) -> None:
    module = load(case(pattern))
    given = inputs(module, case(pattern, batch=1, tokens=700))
    ends = [0, 1, 130, 131, 515, 700]
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    packed = run(module, given, cu_seqlens=cu_seqlens, max_seqlen=384)
    for first, end in pairwise(ends):
        own = {name: cut(x, first, end, 700) for name, x in given.items()}
        alone = run(module, own)
        for whole, piece in zip(packed, alone, strict=True):
            torch.testing.assert_close(whole[:, :, first:end], piece, rtol=0.02, atol=0.02)


def cut(x: Tensor, first: int, end: int, tokens: int) -> Tensor:
    if x.dim() == 4:
        return x[:, :, first:end]
    return x[:, first:end] if x.dim() == 2 and x.shape[1] == tokens else x


def run(module: ModuleType, given: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Output and gradients for the sum of squares of the output."""
    leaves = {name: given[name].detach().requires_grad_() for name in differentiable(given)}
    out = module.attention(**given | leaves, **options)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), list(leaves.values()))]


@pytest.mark.parametrize("pattern", ["causal", "streaming_llm"])
def test_pages_in_any_order_give_the_same_bits(pattern: str) -> None:
    shape = case(pattern, tokens=400)
    module = load(shape)
    given = inputs(module, shape)
    width = -(-512 // 64)
    torch.manual_seed(1)
    order = torch.randperm(2 * width, device=DEVICE).int().view(2, width)
    outs = []
    for table in (None, order):
        store = cache(module, shape, 512, page=64, page_table=table)
        first = module.prefill(*(given[name][:, :, :-1] for name in ("q", "k", "v")), store)
        outs.append((first, module.decode(*(given[name][:, :, -1:] for name in ("q", "k", "v")), store)))
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


@pytest.mark.parametrize("pattern", ["causal", "sliding_window", "streaming_llm", "sink_attention"])
@pytest.mark.parametrize("page", [16, 64, None])
def test_a_captured_step_follows_the_lengths(pattern: str, page: int | None) -> None:
    assert timing.graph(case(pattern, page=page, batch=3))["ok"]


@pytest.mark.parametrize("pattern", ["streaming_llm", "document", "block_sparse"])
def test_thirty_runs_give_the_same_bits(pattern: str) -> None:
    module = load(case(pattern))
    given = inputs(module, case(pattern))
    first = run(module, given)
    for _ in range(29):
        assert all(torch.equal(a, b) for a, b in zip(first, run(module, given), strict=True))


def test_offsets_beyond_two_to_the_31() -> None:
    """The last of the tensors' elements lie beyond 2^31; sequences there are the same runs as alone."""
    batch, tokens, shape = 33, 65536, case("sliding_window", params={"window": 256}, heads=8, kv_heads=8, dim=128)
    needed = 2 * batch * 8 * tokens * 128 * 9  # q, k, v, out and their gradients
    if DEVICE == "cpu" or torch.cuda.mem_get_info()[0] < 1.3 * needed:
        pytest.skip(f"needs {1.3 * needed / 2**30:.0f} GiB of free device memory")
    module = load(shape)
    q, k, v = (torch.randn(batch, 8, tokens, 128, dtype=torch.bfloat16, device=DEVICE) for _ in range(3))
    assert q.numel() > 2**31
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = module.attention(*leaves)
    grads = torch.autograd.grad(out, leaves, torch.ones((), dtype=out.dtype, device=DEVICE).expand_as(out))
    for s in (0, batch - 1):
        own = [x[s : s + 1].detach().requires_grad_() for x in (q, k, v)]
        alone = module.attention(*own)
        assert torch.equal(alone[0], out[s])
        for whole, piece in zip(grads, torch.autograd.grad(alone, own, torch.ones_like(alone)), strict=True):
            assert torch.equal(whole[s], piece[0])


def test_strides_of_any_kind() -> None:
    """Transposed, padded and shared tensors equal their contiguous copies bit by bit."""
    module = load(case("streaming_llm"))
    given = inputs(module, case("streaming_llm", tokens=300))
    odd = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in given.items()}
    assert all(torch.equal(a, b) for a, b in zip(run(module, given), run(module, odd), strict=True))
    padded = {name: torch.nn.functional.pad(x, (0, 3))[..., :64] for name, x in given.items()}
    for a, b in zip(run(module, given), run(module, padded), strict=True):
        torch.testing.assert_close(a, b, rtol=0.01, atol=0.01)


def test_poisoned_memory_is_never_read() -> None:
    """What lies behind the lengths of a cache may be NaN."""
    shape = case("causal", tokens=200)
    module = load(shape)
    given = inputs(module, shape)
    store = cache(module, shape, 512, page=64)
    for kept in (*store.k.values(), *store.v.values()):
        kept.fill_(torch.nan)
    module.prefill(*(given[name][:, :, :-1] for name in ("q", "k", "v")), store)
    out = module.decode(*(given[name][:, :, -1:] for name in ("q", "k", "v")), store)
    assert out.isfinite().all()


@pytest.mark.parametrize("dim, v_dim", [(64, 64), (128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("set_of", ["where(m[q][k])", "all"])
def test_numbers_for_each_pair(set_of: str, dim: int, v_dim: int) -> None:
    """A mask and a bias that the call brings for its rows: whole, and in chunks through a cache."""
    module = spdsl.load(
        "pattern pairs { causal m = tensor(query, token, bool) b = tensor(head, query, token) "
        f"return attend(sliding(9) & {set_of} | sink(1), bias = b[h][q][k]) }}"
    )
    like = {"device": DEVICE, "dtype": torch.bfloat16}
    q, k, v = (torch.randn(2, heads, 300, width, **like) for heads, width in ((8, dim), (2, dim), (2, v_dim)))
    bias = torch.randn(2, 1, 300, 300, **like).expand(-1, 8, -1, -1)
    rows = {"m": torch.rand(1, 300, 300, device=DEVICE) < 0.5, "b": bias} if "m" in set_of else {"b": bias}
    own = [x.requires_grad_() for x in (q, k, v)]
    found, meant = module.attention(*own, **rows), module.reference(*own, **rows)
    dout = torch.randn_like(found)
    grads = torch.autograd.grad(found, own, dout), torch.autograd.grad(meant, own, dout.double())
    for x, wanted in zip((found, *grads[0]), (meant, *grads[1]), strict=True):
        assert_near(x, wanted)
    store = module.Cache(2, 320, kv_heads=2, qk_dim=dim, v_dim=v_dim, page=64, **like)
    for first, end in ((0, 200), (200, 299), (299, 300)):
        part = [x.detach()[:, :, first:end] for x in own]
        step = module.decode if end - first == 1 else module.prefill
        named = {"b": bias[:, :, first:end]} | ({"m": rows["m"][:, first:end]} if "m" in rows else {})
        assert_near(step(*part, **named, cache=store), meant[:, :, first:end].detach())


def assert_near(found: Tensor, wanted: Tensor) -> None:
    """Within 2 % of the largest number: bf16 keeps 8 bits, and a key sums over all rows."""
    assert (found.double() - wanted.double()).abs().max() <= 0.02 * wanted.abs().max()
