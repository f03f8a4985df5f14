"""Compression and selection in packed and padded sequences, and over a cache: each row is what it is by itself."""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType

import pytest
import torch

from spdsl.ir.pattern import Choice, Weight
from spdsl.ir.pattern import Tensor as TensorInput
from spdsl.oracle import dense
from tests.numerics.cases import (
    Found,
    Shape,
    assert_same,
    cached,
    cut,
    differentiable,
    generated,
    guarded,
    inputs_of,
    meant,
    nan_cache,
    separate,
)  # fmt: skip
from tests.numerics.conftest import Engine
from tests.numerics.patterns import pattern_of
from tests.numerics.selected import SELECTED, expect_lists, published, recorded

ENDS = [0, 19, 19, 20, 26, 57]  # one is empty, one has a token, one is shorter than a cell
PACKED = ["nsa", "moba", "softmax", "heads apart", "within", "sink", "msa_minimax", "max", "cells as units",
          "threshold of at least", "tiles of rows"]  # fmt: skip
# Dense below a length, the result depends on the chunks: here it never is.
LONG = published("infllm_v2", ("compress(32, 16", "compress(8, 4"), ("return attend(all) if length < 8192", ""),
                 block=16, count=2, local=2)  # fmt: skip
CHUNKABLE = {"infllm_v2": LONG} | {
    name: SELECTED[name]
    for name in ("nsa", "moba", "msa_minimax", "units of four cells", "softmax", "max", "heads apart", "threshold",
                 "threshold of at least", "at least of a logit", "cosine", "threshold of a cosine",
                 "sink", "within", "bias", "value is key", "softmax of a stream without values")
}  # fmt: skip


def shape_of(body: str, rows: int, batch: int = 1) -> Shape:
    return Shape(rows, rows, batch, **({"heads": 4, "kv_heads": 2} if "heads query" in body else {}))


@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences_are_separate_runs(engine: Engine, name: str) -> None:
    if engine.name == "interpreted" and name not in ("nsa", "heads apart", "threshold of at least"):
        pytest.skip("the same kernels in fewer patterns")
    check_packed(SELECTED[name], engine(SELECTED[name]), ENDS)


def check_packed(body: str, module: ModuleType, ends: list[int]) -> None:
    pattern = pattern_of(body)
    inputs = {key: guarded(x) for key, x in inputs_of(pattern, shape_of(body, ends[-1])).items()}
    with recorded(module, pattern) as lists:
        found = generated(module, pattern, inputs, {"cu_seqlens": torch.tensor(ends, dtype=torch.int32)})
    assert_same(found, separate(pattern, inputs, list(pairwise(ends))))
    expect_lists(lists, pattern, inputs, ends)


@pytest.mark.parametrize("name", ["nsa", "moba", "softmax", "threshold of at least", "bias"])
def test_left_padding(engine: Engine, name: str) -> None:
    """Padding may hold NaN; its rows are empty and its gradients 0, also those of the weights."""
    if engine.name == "interpreted" and name != "nsa":
        pytest.skip("the same kernels in fewer patterns")
    lengths = [21, 0, 18] if engine.name == "interpreted" else [37, 1, 0, 18]
    check_padded(SELECTED[name], engine(SELECTED[name]), lengths)


def check_padded(body: str, module: ModuleType, lengths: list[int]) -> None:
    batch, size = len(lengths), lengths[0]
    pattern = pattern_of(body)
    inputs = inputs_of(pattern, Shape(size, size, batch=batch))
    vectors = [key for key in differentiable(pattern, inputs) if inputs[key].dim() == 4]
    vectors = [key for key in vectors if inputs[key].shape[0] == batch]
    learned = [found.name for found in pattern.inputs if isinstance(found, Weight)]
    vectors = [key for key in vectors if key not in learned]
    lists = [found.name for found in pattern.inputs if isinstance(found, Choice) and found.listed]
    for key in vectors:
        if key != "gates":  # they are applied as they are
            for row, length in enumerate(lengths):
                inputs[key][row, :, : size - length] = torch.nan
    found = generated(module, pattern, inputs, {"lengths": torch.tensor(lengths)})
    for row, length in enumerate(lengths):
        for out, lse in found.parts:
            assert out[row, :, : size - length].eq(0).all()
            assert lse[row, :, : size - length].eq(-torch.inf).all()
        for key in vectors:
            assert found.grads[key][row, :, : size - length].eq(0).all()
        if length:
            rows = {*vectors, *lists}
            own = {key: x[row : row + 1, :, size - length :] if key in rows else x for key, x in inputs.items()}
            single = [x.name for x in pattern.inputs if isinstance(x, TensorInput) and not x.axes]
            own |= {key: inputs[key][row : row + 1] for key in single}
            of_tokens = [x.name for x in pattern.inputs if isinstance(x, TensorInput) and x.axes == ("token",)]
            own |= {key: inputs[key][row : row + 1, size - length :] for key in of_tokens}
            tail = [(out[row : row + 1, :, -length:], lse[row : row + 1, :, -length:]) for out, lse in found.parts]
            assert_same(Found(tail), meant(pattern, own, backward=False))
    assert all(grad.isfinite().all() for grad in found.grads.values())


@pytest.mark.parametrize("name", ["nsa", "moba", "softmax"])
def test_left_padded_rows_have_the_gradients_of_their_own_tokens(engine: Engine, name: str) -> None:
    if engine.name == "interpreted" and name != "moba":
        pytest.skip("the same kernels in fewer patterns")
    pattern, module = pattern_of(SELECTED[name]), engine(SELECTED[name])
    length, size = 34, 37
    inputs = inputs_of(pattern, Shape(size, size))
    given = {key: x.requires_grad_(x.is_floating_point()) for key, x in inputs.items()}
    names = differentiable(pattern, given)
    out = module.attention(**given, lengths=torch.tensor([length]))[:, :, size - length :]
    weights = torch.randn_like(out)
    wanted = module.attention(
        **{key: x[:, :, size - length :] if x.shape[2:3] == (size,) else x for key, x in given.items()}
    )
    for key, x, y in zip(
        names,
        torch.autograd.grad((out * weights).sum(), [given[key] for key in names]),
        torch.autograd.grad((wanted * weights).sum(), [given[key] for key in names]),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10, msg=lambda m, key=key: f"d{key}: {m}")


CHUNKS = {"1": [1] * 41, "3": [3] * 13 + [2], "16": [16, 16, 9], "17": [17, 17, 7], "one": [41]}


@pytest.mark.parametrize("chunks", ["1", "16", "one", *(pytest.param(x, marks=pytest.mark.full) for x in ("3", "17"))])
@pytest.mark.parametrize("page", [None, 16], ids=["contiguous", "paged"])
@pytest.mark.parametrize("name", CHUNKABLE)
def test_chunks_are_attention(cpu: Engine, name: str, page: int | None, chunks: str) -> None:
    if (page is None) != (list(CHUNKABLE).index(name) + list(CHUNKS).index(chunks)) % 2:
        pytest.skip("pairwise")
    check_chunks(CHUNKABLE[name], cpu(CHUNKABLE[name]), page, CHUNKS[chunks], 0, 2)


@pytest.mark.parametrize("page", [None, 16], ids=["contiguous", "paged"])
@pytest.mark.parametrize("name", CHUNKABLE)
def test_decode_of_every_token_is_attention(cpu: Engine, name: str, page: int | None) -> None:
    if (page is None) != list(CHUNKABLE).index(name) % 2:
        pytest.skip("pairwise")
    check_chunks(CHUNKABLE[name], cpu(CHUNKABLE[name]), page, [], 41, 2)


@pytest.mark.parametrize(
    "name, page, chunks, decoded",
    [
        pytest.param("nsa", 16, [17], 5, marks=pytest.mark.quick),
        pytest.param("moba", 16, [3, 1, 30], 4, marks=pytest.mark.quick),
        ("threshold of at least", 16, [17, 16], 2), ("msa_minimax", 16, [1, 15, 16], 2), ("sink", 16, [32], 2),
        *(pytest.param(*case, marks=pytest.mark.full) for case in (
            ("infllm_v2", 16, [16, 18], 3), ("nsa", None, [3, 31], 3), ("msa_minimax", None, [33], 2),
            ("units of four cells", 16, [64, 1], 3),
            ("heads apart", None, [31], 4), ("softmax", 16, [32], 3), ("value is key", 16, [15, 18], 2),
            ("bias", None, [32], 2),
        )),
    ],
)  # fmt: skip
def test_chunks_and_steps_of_kernels(
    kernels: Engine, name: str, page: int | None, chunks: list[int], decoded: int
) -> None:
    check_chunks(CHUNKABLE[name], kernels(CHUNKABLE[name]), page, chunks, decoded, 1)


def check_chunks(body: str, module: ModuleType, page: int | None, chunks: list[int], decoded: int, batch: int) -> None:
    """Free memory is NaN and pages lie in any order."""
    pattern, shape = pattern_of(body), shape_of(body, sum(chunks) + decoded, batch)
    inputs = inputs_of(pattern, shape)
    found = cached(module, pattern, inputs, chunks, decoded, nan_cache(module, shape, shape.rows + 7, page))
    assert_same(Found(found), Found(dense.results(pattern, inputs, "prefill")[: len(found)]))


@pytest.mark.parametrize("page", [None, 16])
def test_a_row_that_starts_anew(cpu: Engine, page: int | None) -> None:
    """Row 1 starts again after 20 tokens: entries of what it held are NaN, and must be made anew."""
    body = SELECTED["nsa"]
    shape, module, pattern = Shape(20, 20, batch=2), cpu(body), pattern_of(body)
    cache, old = nan_cache(module, shape, 48, page), inputs_of(pattern, shape)
    cached(module, pattern, old, [20], 0, cache)
    cache.reset([1])
    for name in ("entries", "rough", "picked", "recent"):
        for store in (cache.k[name], cache.v[name]):
            store[1 if page is None or name == "entries" else cache.page_table[1].long()] = torch.nan
    new = inputs_of(pattern, Shape(19, 19, batch=2, seed=1))
    learned = {found.name for found in pattern.inputs if isinstance(found, Weight)}
    new |= {key: old[key] for key in learned}
    found = cached(module, pattern, new, [17], 2, cache)
    whole = {key: x if key in learned else torch.cat([x, new[key]], 2) for key, x in old.items()}
    for row, inputs in ((0, whole), (1, new)):
        own = {key: x if key in learned else x[row : row + 1] for key, x in inputs.items()}
        wanted = dense.results(pattern, own, "prefill")
        parts = [(out[row : row + 1], lse[row : row + 1]) for out, lse in found]
        assert_same(Found(parts), Found([(out[:, :, -19:], lse[:, :, -19:]) for out, lse in wanted]))


@pytest.mark.parametrize("page", [None, 16])
def test_given_tiles_at_prefill_and_all_keys_at_decode(engine: Engine, page: int | None) -> None:
    body = SELECTED["seer_attention"]
    shape, module, pattern = Shape(37, 37), engine(body), pattern_of(body)
    inputs = inputs_of(pattern, shape)
    cache = nan_cache(module, shape, 48, page)
    part = {key: x if key == "chosen" else x[:, :, :35] for key, x in inputs.items()}
    out = module.prefill(**part, cache=cache)
    torch.testing.assert_close(out, dense.attention(pattern, part, "prefill")[0], rtol=1e-10, atol=1e-10)
    whole, _ = dense.attention(pattern, inputs, "decode")
    for i in (35, 36):
        step = {key: x[:, :, -1:] if key == "chosen" else x[:, :, i : i + 1] for key, x in inputs.items()}
        out = module.decode(**step, cache=cache)
        torch.testing.assert_close(out, whole[:, :, i : i + 1], rtol=1e-10, atol=1e-10)


ROWS = (
    "causal entries = compress(8, 4, by = mean) rank = dot(entries) "
    "chosen = top_k(2, score = rank, share = max(group), unit = max(16), rows = max(16), force = last(1)) "
    "return attend(chosen | sliding(5)) if prefill return attend(all)"
)


@pytest.mark.parametrize("page", [None, 16])
def test_tiles_of_rows_at_prefill(engine: Engine, page: int | None) -> None:
    """Chunks that begin and end within a tile: the queries of one call in one tile choose together."""
    pattern, module = pattern_of(ROWS), engine(ROWS)
    inputs = inputs_of(pattern, Shape(53, 53, batch=2))
    cache = module.Cache(2, 64, kv_heads=1, qk_dim=16, v_dim=16, page=page, dtype=torch.float64)
    first = 0
    for rows in (19, 16, 18):
        end = first + rows
        new = cut(pattern, inputs, first, end)
        found = module.prefill(**new, cache=cache, return_lse=True)
        seen = {**cut(pattern, inputs, 0, end), "q": new["q"]}
        ((out, lse),) = dense.results(pattern, seen, "prefill")
        torch.testing.assert_close(found[0], out, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found[1], lse, rtol=1e-10, atol=1e-10)
        first = end
