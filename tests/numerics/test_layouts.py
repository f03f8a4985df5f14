"""Sizes, head counts, head dims, strides, packed and padded sequences, parts of longer sequences."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.numerics.cases import (
    Found,
    Inputs,
    Shape,
    assert_same,
    checked,
    generated,
    guarded,
    inputs_of,
    meant,
    separate,
)
from tests.numerics.conftest import Engine
from tests.numerics.patterns import pattern_of
from tests.numerics.strides import gaps_between_rows, gaps_in_rows

SIZES = [(1, 1), (15, 15), (16, 16), (17, 17), (33, 33), (37, 37), (1, 37), (17, 40), (40, 17), (33, 1), (16, 48)]


@pytest.mark.parametrize("rows, keys", SIZES)
@pytest.mark.parametrize("name", ["streaming_llm", "token_both"])
def test_sizes(engine: Engine, name: str, rows: int, keys: int) -> None:
    """Rows stand at the end of the keys; of more rows than keys the first ones come before any key."""
    checked(name, Shape(rows, keys, batch=1 if engine.name == "interpreted" else 2), module=engine(name))


@pytest.mark.parametrize(
    "name, rows, keys",
    [
        ("dilated", 40, 17), ("dilated", 17, 40), ("sink_attention", 40, 17), ("document", 17, 40),
        ("by_head", 40, 17), ("two_streams", 17, 40), ("drawn", 40, 17), ("drawn", 1, 33), ("units", 17, 40),
    ],
)  # fmt: skip
def test_other_numbers_of_rows_and_keys(engine: Engine, name: str, rows: int, keys: int) -> None:
    checked(name, Shape(rows, keys), module=engine(name))


@pytest.mark.parametrize(
    "batch, heads, rows, keys", [(0, 2, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0), (1, 0, 5, 5), (2, 2, 0, 0)]
)
def test_nothing_to_do(engine: Engine, batch: int, heads: int, rows: int, keys: int) -> None:
    module = engine("streaming_llm")
    q = torch.randn(batch, heads, rows, 16, requires_grad=True)
    k, v = (torch.randn(batch, max(heads, 1), keys, 16, requires_grad=True) for _ in "kv")
    out, lse = module.attention(q, k, v, return_lse=True)
    assert out.shape == (batch, heads, rows, 16)
    assert out.eq(0).all()
    assert lse.eq(-torch.inf).all()
    for grad in torch.autograd.grad(out.sum(), [q, k, v]):
        assert grad.eq(0).all()


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (3, 1), (6, 2), (5, 1), (16, 1)])
@pytest.mark.parametrize("name", ["streaming_llm", "kv_head"])
def test_groups_of_heads(engine: Engine, name: str, heads: int, kv_heads: int) -> None:
    checked(name, Shape(21, 21, heads=heads, kv_heads=kv_heads), module=engine(name))


@pytest.mark.parametrize(
    "qk, v", [(16, 24), (24, 16), (80, 32), (96, 96), (192, 128), (32, 80), (1, 3), (100, 7), (256, 16)]
)
def test_head_dims(engine: Engine, qk: int, v: int) -> None:
    checked("streaming_llm", Shape(18, 18, qk=qk, v=v), module=engine("streaming_llm"))


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _same_for_all(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape)


def _absurd_unit_strides(x: Tensor) -> Tensor:
    return x[:, :1].as_strided((x.shape[0], 1, *x.shape[2:]), (x.stride(0), 3331333, *x.stride()[2:])).expand(x.shape)


FORMS = [_transposed, _same_for_all, _absurd_unit_strides, gaps_in_rows, gaps_between_rows, guarded]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["sink_attention", "dilated"])
def test_strides(engine: Engine, name: str, form: object) -> None:
    pattern, module = pattern_of(name), engine(name)
    inputs = inputs_of(pattern, Shape(33, 33, batch=2, heads=2, kv_heads=2))
    assert callable(form)
    formed = {key: form(x) if x.dim() == 4 else x for key, x in inputs.items()}
    assert_same(generated(module, pattern, formed), meant(pattern, formed))


PACKED = [
    "streaming_llm",
    "document",
    "softcap_sink",
    "dilated",
    "two_streams",
    "token_bias",
    "alibi",
    "empty_rows",
    "by_head",
]


@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences_are_separate_runs(engine: Engine, name: str) -> None:
    """One is empty and one has a single token."""
    ends = [0, 19, 19, 20, 37]
    pattern, module = pattern_of(name), engine(name)
    inputs = {key: guarded(x) for key, x in inputs_of(pattern, Shape(37, 37)).items()}
    for most in (None, 19):
        call = {"cu_seqlens": torch.tensor(ends, dtype=torch.int32), "max_seqlen": most}
        found = generated(module, pattern, inputs, call)
        assert_same(found, separate(pattern, inputs, list(pairwise(ends))))


@pytest.mark.parametrize("name", ["streaming_llm", "document", "dilated", "alibi", "sink_attention", "two_streams"])
def test_left_padding(engine: Engine, name: str) -> None:
    """Padding may hold NaN; its rows are empty and its gradients 0."""
    lengths, size = [21, 1, 0, 17], 21
    pattern, module = pattern_of(name), engine(name)
    inputs = inputs_of(pattern, Shape(size, size, batch=4))
    vectors = [key for key, x in inputs.items() if x.dim() == 4]
    for key, x in inputs.items():
        for row, length in enumerate(lengths):
            if key in vectors:
                x[row, :, : size - length] = torch.nan
    found = generated(module, pattern, inputs, {"lengths": torch.tensor(lengths)})
    for row, length in enumerate(lengths):
        own = {key: inputs[key][row : row + 1, :, size - length :] for key in vectors}
        rest = {key: x for key, x in inputs.items() if key not in vectors}
        own |= {key: x[row : row + 1, size - length :] if x.dim() == 2 else x for key, x in rest.items()}
        wanted = meant(pattern, own, backward=False) if length else None
        for out, lse in found.parts:
            assert out[row, :, : size - length].eq(0).all()
            assert lse[row, :, : size - length].eq(-torch.inf).all()
        if wanted:
            tail = [(out[row : row + 1, :, -length:], lse[row : row + 1, :, -length:]) for out, lse in found.parts]
            assert_same(Found(tail), wanted)
        for grad in (x for x in found.grads.values() if x.dim() == 4):
            assert grad[row, :, : size - length].eq(0).all()
    assert all(grad.isfinite().all() for grad in found.grads.values())


@pytest.mark.parametrize(
    "name, offsets",
    [
        *(("streaming_llm", offsets) for offsets in [(23, 0), (10, 30), (30, 10), (0, 0), (5, 33)]),
        *(("token_both", offsets) for offsets in [(23, 0), (10, 30), (30, 10)]),
        ("dilated", (23, 0)), ("dilated", (30, 10)), ("block_sparse", (30, 10)), ("alibi", (10, 30)),
        ("drawn", (30, 10)), ("quotient", (23, 0)), ("quotient", (10, 30)),
    ],
)  # fmt: skip
def test_parts_of_longer_sequences(engine: Engine, name: str, offsets: tuple[int, int]) -> None:
    checked(name, Shape(18, 33, offsets=offsets), module=engine(name))


@pytest.mark.parametrize("name", ["causal", "streaming_llm", "document"])
def test_two_key_shards_merge_to_the_whole(engine: Engine, name: str) -> None:
    pattern, module = pattern_of(name), engine(name)
    inputs = inputs_of(pattern, Shape(40, 40))

    def shard(first: int, end: int) -> tuple[Tensor, Tensor]:
        part: Inputs = {key: x[:, :, first:end] if key in "kv" else x for key, x in inputs.items()}
        out, lse = module.attention(**part, q_offset=0, k_offset=first, return_lse=True)
        return out, lse

    (out0, lse0), (out1, lse1) = shard(0, 23), shard(23, 40)
    lse = torch.logaddexp(lse0, lse1)
    out = torch.exp(lse0 - lse)[..., None] * out0 + torch.exp(lse1 - lse)[..., None] * out1
    assert_same(Found([(out, lse)]), meant(pattern, inputs, backward=False))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["streaming_llm", "document"])
def test_repeats_are_equal_to_the_bit(engine: Engine, name: str, dtype: torch.dtype) -> None:
    pattern, module = pattern_of(name), engine(name)
    inputs = inputs_of(pattern, Shape(37, 37), dtype)
    first, second = (generated(module, pattern, inputs) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first.parts[0], second.parts[0], strict=True))
    assert all(torch.equal(first.grads[key], second.grads[key]) for key in first.grads)


@pytest.mark.parametrize("name", ["streaming_llm", "document"])
def test_a_batch_row_alone_gives_the_same_bits(kernels: Engine, name: str) -> None:
    pattern, module = pattern_of(name), kernels(name)
    inputs = inputs_of(pattern, Shape(37, 37, batch=3), torch.float32)
    found = module.attention(**inputs, return_lse=True)
    for row in range(3):
        alone = module.attention(**{key: x[row : row + 1] for key, x in inputs.items()}, return_lse=True)
        assert all(torch.equal(x[row : row + 1], y) for x, y in zip(found, alone, strict=True))


@pytest.mark.parametrize("name", ["empty_rows", "hole"])
def test_rows_without_keys(engine: Engine, name: str) -> None:
    """0, -inf and gradients 0 exactly, whatever flows back."""
    found = checked(name, Shape(), module=engine(name))
    ((out, lse),) = found.parts
    empty = lse == -torch.inf
    assert empty.any()
    assert out[empty].eq(0).all()
    assert found.grads["q"][empty].eq(0).all()


def test_nan_stays_with_the_rows_that_see_it(engine: Engine) -> None:
    pattern, module = pattern_of("streaming_llm"), engine("streaming_llm")
    inputs = inputs_of(pattern, Shape(50, 50))
    ((clean, clean_lse),) = generated(module, pattern, inputs, backward=False).parts
    sees = (torch.arange(50) >= 10) & (torch.arange(50) < 44)
    inputs["k"][:, :, 10] = torch.nan
    if engine.name == "cpu":  # kernels multiply a block of values as a whole: 0 times NaN reaches its other rows
        inputs["v"][:, :, 10] = torch.nan
    ((out, lse),) = generated(module, pattern, inputs, backward=False).parts
    assert out[:, :, sees].isnan().all()
    assert lse[:, :, sees].isnan().all()
    torch.testing.assert_close(out[:, :, ~sees], clean[:, :, ~sees], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse[:, :, ~sees], clean_lse[:, :, ~sees], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [97, 128, 161, 255, 400])
@pytest.mark.parametrize(
    "name", ["streaming_llm", "longformer", "dilated", "big_bird", "two_streams_sink", "token_bias", "merge"]
)
def test_sizes_of_many_tiles(cpu: Engine, name: str, size: int) -> None:
    checked(name, Shape(size, size, batch=2, heads=6, kv_heads=2, qk=24, v=40), module=cpu(name))


@pytest.mark.parametrize("lse_gradient", [False, True])
@pytest.mark.parametrize("name", ["streaming_llm", "document", "softcap_sink"])
def test_with_and_without_a_gradient_of_the_lse(engine: Engine, name: str, lse_gradient: bool) -> None:
    checked(name, Shape(37, 37), module=engine(name), lse_gradient=lse_gradient)


def test_lse_is_a_natural_logarithm(engine: Engine) -> None:
    module = engine("everything")
    q, k, v = (torch.zeros(1, 1, size, 16, dtype=torch.float64) for size in (3, 20, 20))
    _, lse = module.attention(q, k, v, return_lse=True)
    torch.testing.assert_close(lse, torch.full_like(lse, 20.0).log())
