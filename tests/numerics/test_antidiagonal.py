"""Scores of cells of queries and keys along antidiagonals: choices by them are those of the definition."""

from __future__ import annotations

from math import inf, nan, sqrt
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import spdsl
from spdsl.oracle import dense
from tests.library import broken
from tests.numerics.cases import Found, Inputs, Shape, assert_same, cut, inputs_of, nan_cache, parts_of
from tests.numerics.conftest import Engine
from tests.numerics.patterns import pattern_of, text_of
from tests.numerics.selected import chosen_of, expect_lists
from tests.numerics.test_selection import checked
from tests.numerics.test_selection_layouts import check_packed, check_padded
from tests.quick import quick
from tests.sanitizer.mode import sanitized


def by_cells(rule: str, more: str = "", step: int = 4) -> str:
    return f"{more} rank = antidiagonal({step}) chosen = {rule} return attend(chosen)"


WHOLE = {
    "mass of a head": by_cells("top_p(0.6, score = softmax(rank), share = head, rows = sum(16), unit = sum(16))"),
    "mass of a group": by_cells(
        "top_p(0.5, score = softmax(rank), share = sum(group), rows = mean(12), unit = sum(16), most = 3)"
    ),
    "logits of a group": by_cells("top_k(2, score = rank, share = mean(group), rows = max(8), unit = mean(16))"),
    "cells as they are": by_cells(
        "threshold(0.1, score = rank, share = head, least = 1, most = 5, unit = max(16), force = first(1))"
    ),
    "a level of heads": by_cells(
        "threshold(x[h], score = rank, share = head, rows = max(8), unit = max(16), least = n, most = 3)",
        more="x = tensor(head) n = tensor(int)",
    ),
    "another stream": (
        "index = stream(value = none) q_index = query() rank = antidiagonal(3, index, query = q_index, scale = 0.7) "
        "chosen = top_k(2, score = softmax(rank), share = max(group), rows = sum(6), unit = max(18)) "
        "return attend(chosen)"
    ),
}
CAUSAL = (
    "causal rank = softmax(antidiagonal(4)) chosen = top_p(0.6, score = rank, share = head, rows = sum(16), "
    "unit = sum(16), force = first(1) | last(1), within = where(k < 64)) "
    "return attend(chosen) if prefill return attend(all)"
)


@pytest.mark.parametrize("name", quick(WHOLE, list(WHOLE)[:1]))
def test_lists_and_results(engine: Engine, name: str) -> None:
    if engine.name == "interpreted" and name not in ("mass of a head", "cells as they are", "another stream"):
        pytest.skip("the same kernels in fewer patterns")
    shape = Shape(21, 75, 2, 4, 2) if engine.name == "interpreted" else Shape(33, 83, 2, 4, 2)
    checked(WHOLE[name], shape, engine(WHOLE[name]))


@pytest.mark.parametrize("rows, keys", [(1, 1), (3, 3), (16, 16), (5, 50), (50, 47)])
def test_sizes(engine: Engine, rows: int, keys: int) -> None:
    body = WHOLE["mass of a head"]
    checked(body, Shape(rows, keys), engine(body))


@pytest.mark.parametrize("name", ["mass of a group", "cells as they are", "a level of heads"])
def test_packed_and_padded(engine: Engine, name: str) -> None:
    if engine.name == "interpreted" and name != "mass of a group":
        pytest.skip("the same kernels in fewer patterns")
    check_packed(WHOLE[name], engine(WHOLE[name]), [0, 21, 21, 22, 38])
    check_padded(WHOLE[name], engine(WHOLE[name]), [21, 0, 18])


@pytest.mark.parametrize("page", [16, None])
def test_chunks(engine: Engine, page: int | None) -> None:
    """A chunk that ends in a cell and in a tile chooses by what it holds of them."""
    if engine.name == "interpreted" and page is None:
        pytest.skip("one way to find rows in a cache is enough")
    shape = Shape(70, 70, 2, 4, 2)
    module, pattern = engine(CAUSAL), pattern_of(CAUSAL)
    inputs, cache = inputs_of(pattern, shape), nan_cache(module, shape, 80, page)
    for first, end in ((0, 18), (18, 64), (64, 70)):
        call = module.prefill(**cut(pattern, inputs, first, end), cache=cache, return_lse=True)
        seen = {**cut(pattern, inputs, 0, end), "q": inputs["q"][:, :, first:end]}
        assert_same(Found(parts_of(call)), Found(dense.results(pattern, seen, "prefill")))


def lists(module: object, inputs: Inputs) -> dict[str, Tensor]:
    return module.choices(**inputs, phase="prefill")  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize("case", ["equal", "spike", "-inf", "nan", "nan of a key", "tie"])
def test_unusual_scores(engine: Engine, case: str) -> None:
    if engine.name == "interpreted" and case in ("equal", "nan"):
        pytest.skip("the same kernels in fewer cases")
    body = CAUSAL.replace("0.6", "0.5") if case == "tie" else CAUSAL
    module, pattern = engine(body), pattern_of(body)
    inputs = inputs_of(pattern, Shape(44, 60, 1, 4, 2))
    q, k = inputs["q"], inputs["k"]
    if case in ("equal", "tie"):
        q.zero_()
    elif case == "spike":
        k[:, :, 21] *= 300
    elif case == "-inf":
        k[:, :, 17:25] = -inf
        q.abs_().add_(0.1)
    elif case == "nan":
        q[:, 1, 30] = nan
    else:
        k[:, 0, 9] = nan
    expect_lists(lists(module, inputs), pattern, inputs)


def published(q: Tensor, k: Tensor, step: int, block: int, part: float) -> Tensor:
    """The tiles that XAttention's code takes, bool [B, H, N / block, N / block]: whole tiles, causal.

    Keys are stacked as they come, queries in reverse; a softmax over what is not later; sums over tiles; the first and
    the own tile in front of the others by falling sums, and every tile that has less than the part before it.
    """
    rows, dim = q.shape[2], q.shape[3]
    keys = torch.cat([k[:, :, s::step] for s in range(step)], -1).repeat_interleave(q.shape[1] // k.shape[1], 1)
    queries = torch.cat([q[:, :, step - 1 - s :: step] for s in range(step)], -1)
    x = queries @ keys.transpose(-1, -2) / (sqrt(dim) * step)
    later = torch.ones(rows // step, rows // step, dtype=torch.bool).triu(1)
    p = x.masked_fill(later, -inf).softmax(-1)
    sums = p.unflatten(3, (-1, block // step)).sum(4).unflatten(2, (-1, block // step)).sum(3)
    forced = torch.eye(rows // block, dtype=torch.bool)
    forced[:, 0] = True
    order = torch.where(forced, inf, sums).sort(dim=-1, descending=True, stable=True).indices
    falling = sums.gather(-1, order)
    taken = (falling.cumsum(-1) - falling < part * sums.sum(-1, keepdim=True)) | forced.expand_as(sums).gather(
        -1, order
    )
    found = torch.zeros_like(taken).scatter(-1, order, taken)
    return found & torch.ones(rows // block, rows // block, dtype=torch.bool).tril()


@pytest.mark.parametrize("part", [0.3, 0.9])
def test_the_published_tiles(cpu: Engine, part: float) -> None:
    body = CAUSAL.replace("0.6", str(part)).replace(", within = where(k < 64)", "")
    inputs = inputs_of(pattern_of(body), Shape(256, 256, 2, 4, 2))
    inputs["q"] *= 12
    wanted = published(inputs["q"], inputs["k"], 4, 16, part).nonzero()
    found = lists(cpu(body), inputs)["chosen"]
    one_hot = torch.nn.functional.one_hot(found.long() + 1, 17)[..., 1:].sum(3)
    assert torch.equal(one_hot.nonzero(), wanted)
    assert 0.1 < len(wanted) / (2 * 4 * 136) < 0.95


# XAttention (arXiv 2503.16428): antidiagonal sums at a stride, a part of all mass for each head, over tiles.
XATTENTION = (
    "param step = {step}, block = {block} causal part = tensor(head) rank = softmax(antidiagonal(step)) "
    "chosen = top_p(part[h], score = rank, rows = sum(block), unit = sum(block), share = head, "
    "force = first(1) | last(1)) return attend(chosen) if prefill return attend(all)"
)


def test_xattention_as_it_is_published(cpu: Engine) -> None:
    """Parts by head; tiles and outputs are those of the published rule, far from near ties; a step is dense."""
    body = XATTENTION.format(step=8, block=32)
    module, pattern, shape = cpu(body), pattern_of(body), Shape(256, 256, 1, 4, 2)
    inputs = inputs_of(pattern, shape)
    inputs["q"] *= 12
    parts = inputs["part"] = torch.tensor([[0.3, 0.6, 0.9, 0.99]]).double()
    q, k, v = (inputs[name].repeat_interleave(4 // inputs[name].shape[1], 1) for name in "qkv")
    tiles = torch.cat([published(q[:, i : i + 1], k[:, i : i + 1], 8, 32, float(parts[0, i])) for i in range(4)], 1)
    mask = tiles.repeat_interleave(32, 2).repeat_interleave(32, 3).tril()
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
    found = module.prefill(**inputs, cache=nan_cache(module, shape, 264, 16))
    assert torch.allclose(found, wanted, atol=1e-10)
    assert tiles.sum() < 0.9 * 4 * 36


def test_products_by_hand() -> None:
    """Two cells of two: the score of (i, j) is q[2i + 1] . k[2j] + q[2i] . k[2j + 1], halved; the last key is alone."""
    pattern = pattern_of(by_cells("top_k(1, score = rank, share = head, unit = max(16))", step=2))
    inputs = inputs_of(pattern, Shape(4, 3, 1, 1, 1, qk=16))
    q = torch.zeros(1, 1, 4, 16, dtype=torch.float64)
    k = torch.zeros(1, 1, 3, 16, dtype=torch.float64)
    q[0, 0, :, 0], k[0, 0, :, 0] = torch.tensor([1.0, 10, 100, 1000]), torch.tensor([2.0, 3, 5])
    call = dense.Call(pattern, {**inputs, "q": q, "k": k}, dense.sizes_of(pattern, {**inputs, "q": q, "k": k}, 0))
    (choice,) = [found for found in pattern.inputs if isinstance(found, spdsl.ir.pattern.Choice)]
    values, seen = call.score(choice.score)
    scale = 1 / sqrt(16) / 2
    wanted = torch.tensor([[10 * 2 + 1 * 3, 10 * 5], [1000 * 2 + 100 * 3, 1000 * 5]], dtype=torch.float64)
    assert torch.allclose(values[0, 0], wanted * scale)
    assert seen.all()


def expect_several(module: ModuleType, body: str) -> None:
    pattern = pattern_of(body)
    for seed in range(3):
        inputs = inputs_of(pattern, Shape(21, 75, 2, 4, 2, seed=seed))
        expect_lists(module.choices(**inputs), pattern, inputs)


class Bug(NamedTuple):
    what: str
    old: str
    new: str


BUGS = [
    Bug("queries are not reversed", "(P.STEP - 1 - s)", "s"),
    Bug("a short cell is divided by what is there", "total * (C.SCALE / P.STEP)",
        "total * C.SCALE / tl.minimum(P.STEP, tl.maximum(1, keys.count - entry * P.STEP))[None, :]"),
    Bug("cells begin with the tile's first row", "first - rows.origin + cell", "cell"),
    Bug("a row of no tile is multiplied", "(row >= 0) & (row < rows.count) & ", ""),
]  # fmt: skip


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.what)
def test_a_bug_is_seen(kernels: Engine, bug: Bug, tmp_path: Path) -> None:
    body = WHOLE["logits of a group"]
    module = kernels(broken(spdsl.compile(text_of(body)).text, bug.old, bug.new, tmp_path))
    with sanitized(), pytest.raises(AssertionError):
        expect_several(module, body)


CPU_BUGS = [
    Bug("queries are not reversed", "flipped=True", "flipped=False"),
    Bug("rows of another cell", "q_first % step", "0"),
]


@pytest.mark.parametrize("bug", CPU_BUGS, ids=lambda bug: bug.what)
def test_a_bug_of_torch_is_seen(cpu: Engine, bug: Bug, tmp_path: Path) -> None:
    body = WHOLE["logits of a group"]
    module = cpu(broken(spdsl.compile(text_of(body)).text, bug.old, bug.new, tmp_path))
    with pytest.raises(AssertionError):
        expect_several(module, body)


def test_the_reference_chooses_so() -> None:
    """For `published` above: the oracle's own tiles, without a module."""
    body = CAUSAL.replace(", within = where(k < 64)", "")
    pattern = pattern_of(body)
    inputs = inputs_of(pattern, Shape(64, 64, 1, 2, 1))
    found = chosen_of(pattern, inputs)["chosen"]
    one_hot = torch.nn.functional.one_hot(found.long() + 1, 5)[..., 1:].sum(3)
    assert torch.equal(one_hot.bool(), published(inputs["q"], inputs["k"], 4, 16, 0.6))
