"""What a list of units means: chosen or passed in, empty or full; ties, NaN, repeats, and where gradients go."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spdsl.ir.pattern import Pattern
from spdsl.oracle import dense
from spdsl.runtime.tuning.unit_configs import JOB_TILES_INTERPRETED
from tests.numerics.cases import (
    Found,
    Inputs,
    Shape,
    assert_same,
    cut,
    differentiable,
    generated,
    inputs_of,
    meant,
    nan_cache,
    parts_of,
)  # fmt: skip
from tests.numerics.conftest import Engine
from tests.numerics.patterns import pattern_of
from tests.numerics.selected import SELECTED, by_rank, expect_lists, lists_of, nsa, recorded

INDEX = (
    "causal index = stream(value = none) rank = dot(index) "
    "chosen = top_k(2, score = rank, unit = max(16), share = max(group)) return attend(chosen)"
)


def scrambled(lists: Tensor) -> Tensor:
    """The same units in another order, some twice, with more padding."""
    order = torch.randperm(lists.shape[3], generator=torch.Generator().manual_seed(1))
    padding = torch.full_like(lists[..., :2], -1)
    return torch.cat([lists[..., :1], padding, lists[..., order], lists[..., -1:]], 3)


@pytest.mark.parametrize("name", ["nsa", "heads apart", "infllm_v2"])
def test_order_padding_and_repeats_of_a_passed_choice_do_not_matter(engine: Engine, name: str) -> None:
    if engine.name == "interpreted" and name != "heads apart":
        pytest.skip("the same kernels in fewer patterns")
    body = SELECTED[name]
    pattern, module = pattern_of(body), engine(body)
    rows = 21 if engine.name == "interpreted" else 37
    inputs = inputs_of(pattern, Shape(rows, 37, heads=4, kv_heads=2))
    chosen = dense.choices(pattern, inputs)["chosen"]
    own = generated(module, pattern, inputs)
    for lists in (chosen, scrambled(chosen), scrambled(chosen).long()):
        found = generated(module, pattern, {**inputs, "chosen": lists})
        assert all(torch.equal(x, y) for x, y in zip(found.parts[0], own.parts[0], strict=True))
        assert all(torch.equal(found.grads[key], own.grads[key]) for key in own.grads)


@pytest.mark.parametrize("name", ["nsa", "heads apart"])
def test_a_choice_that_no_score_would_make(engine: Engine, name: str) -> None:
    """Random units, later than the query too, one list for all heads and rows of the batch."""
    if engine.name == "interpreted" and name == "nsa":
        pytest.skip("the same kernels in fewer patterns")
    body = SELECTED[name]
    pattern, module = pattern_of(body), engine(body)
    inputs = inputs_of(pattern, Shape(37, 37, batch=2, heads=4, kv_heads=2))
    units = torch.randint(-1, 3, (1, 1, 37, 3), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    lists = 4 if name == "heads apart" else 2
    found = generated(module, pattern, {**inputs, "chosen": units})
    assert_same(found, meant(pattern, {**inputs, "chosen": units.expand(2, lists, -1, -1)}))


@pytest.mark.parametrize("name", ["moba", "heads apart"])
def test_a_choice_passed_to_a_step_of_generation(engine: Engine, name: str) -> None:
    """In any order, with repeats, and far longer than its units: the bits of the step that chose by itself."""
    if engine.name == "interpreted" and name != "moba":
        pytest.skip("the same kernels in fewer patterns")
    body, shape = SELECTED[name], Shape(37, 37, batch=1 if engine.name == "interpreted" else 2, heads=4, kv_heads=2)
    pattern, module = pattern_of(body), engine(body)
    inputs = inputs_of(pattern, shape)
    chosen = dense.choices(pattern, inputs)["chosen"][:, :, -1:]
    padded = torch.cat([torch.full_like(chosen[..., :1], -1).expand(-1, -1, -1, 300), scrambled(chosen)], 3)
    assert (chosen >= 0).sum(-1).max() > 1
    found = []
    for passed in ({}, {"chosen": chosen}, {"chosen": padded.long()}):
        cache = nan_cache(module, shape, 50, 16)
        module.prefill(**cut(pattern, inputs, 0, 36), cache=cache)
        found.append(parts_of(module.decode(**cut(pattern, inputs, 36, 37), **passed, cache=cache, return_lse=True)))
    for other in found[1:]:
        for part, wanted in zip(other, found[0], strict=True):
            assert all(torch.equal(one, own) for one, own in zip(part, wanted, strict=True))
    assert_same(Found([(out[:, :, -1:], lse[:, :, -1:]) for out, lse in found[0]]), last_row(pattern, inputs))


def last_row(pattern: Pattern, inputs: Inputs) -> Found:
    return Found([(out[:, :, -1:], lse[:, :, -1:]) for out, lse in dense.results(pattern, inputs, "decode")])


def test_empty_lists_give_nothing(engine: Engine) -> None:
    """0, -inf and gradients 0 exactly, whatever flows back; other rows are as they were."""
    body = SELECTED["part of the chosen"]
    pattern, module = pattern_of(body), engine(body)
    inputs = inputs_of(pattern, Shape(37, 37))
    units = dense.choices(pattern, inputs)["chosen"]
    units[:, :, 20:30] = -1
    found = generated(module, pattern, {**inputs, "chosen": units})
    ((out, lse),) = found.parts
    assert out[:, :, 20:30].eq(0).all()
    assert lse[:, :, 20:30].eq(-torch.inf).all()
    assert found.grads["q"][:, :, 20:30].eq(0).all()
    assert_same(found, meant(pattern, {**inputs, "chosen": units}))
    nothing = generated(module, pattern, {**inputs, "chosen": units[..., :1] * 0 - 1})
    assert all(grad.eq(0).all() for grad in nothing.grads.values())
    assert nothing.parts[0][1].eq(-torch.inf).all()


@pytest.mark.parametrize("more", ["causal", ""], ids=["causal", "no order"])
@pytest.mark.parametrize("share", ["head", "max(group)"])
def test_units_past_the_end_of_a_packed_sequence_are_dropped(engine: Engine, share: str, more: str) -> None:
    """Unit 3 is behind both sequences, though not behind all tokens."""
    body = by_rank(f"top_k(2, score = rank, share = {share}, unit = max(16))", more)
    pattern, module = pattern_of(body), engine(body)
    inputs = inputs_of(pattern, Shape(64, 64, heads=2, kv_heads=2))
    starts = torch.tensor([0, 40, 64], dtype=torch.int32)
    results = []
    for units in ([0, 3], [0, -1]):
        leaves = {name: inputs[name].clone().requires_grad_() for name in "qkv"}
        chosen = torch.tensor(units, dtype=torch.int32).expand(1, 2, 64, 2)
        out = module.attention(**leaves, chosen=chosen, cu_seqlens=starts)
        out.backward(torch.ones_like(out))
        results.append([out.detach(), *(x.grad for x in leaves.values())])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        assert wanted.isfinite().all()


@pytest.mark.parametrize("name", ["heads apart", "threshold of a logit"])
def test_no_keys_give_nothing(engine: Engine, name: str) -> None:
    """More rows than one job of pairs has."""
    module = engine(SELECTED[name])
    q, k = torch.ones(1, 2, 60, 16, dtype=torch.float64), torch.ones(1, 1, 0, 16, dtype=torch.float64)
    out, lse = module.attention(q, k, k, return_lse=True)
    assert out.eq(0).all()
    assert lse.eq(-torch.inf).all()


def test_room_for_all_units_and_tokens_is_dense(engine: Engine) -> None:
    body = nsa(count=4, window=50)
    pattern, module, causal = pattern_of(body), engine(body), pattern_of("causal")
    inputs = inputs_of(pattern, Shape(50, 50))
    inputs["gates"] = torch.cat([torch.zeros_like(inputs["gates"][..., :1]), inputs["gates"][..., 1:]], 3)
    ((out, lse),) = generated(module, pattern, inputs, backward=False).parts
    parts = [
        dense.attention(causal, {"q": inputs["q"], "k": inputs[f"k_{name}"], "v": inputs[f"v_{name}"]})
        for name in ("picked", "recent")
    ]
    wanted = sum((inputs["gates"][..., i + 1, None] * part for i, (part, _) in enumerate(parts)), torch.zeros(()))
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lse[..., 1:], torch.stack([x for _, x in parts], -1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("by", ["max", "sum", "mean"])
def test_ties_go_to_the_lowest_units(engine: Engine, by: str) -> None:
    """Of equal logits; entries lie on units, so that all units have equally many."""
    body = by_rank(f"top_k(2, score = rank, share = {by}(group), force = last(1))", compress="16")
    pattern, module = pattern_of(body), engine(body)
    inputs = inputs_of(pattern, Shape(70, 70))
    inputs["q"] = torch.zeros_like(inputs["q"])
    with recorded(module, pattern) as lists:
        module.attention(**inputs)
    for q in (0, 15, 16, 31, 40, 69):
        wanted = {0, q // 16}
        assert set(lists["chosen"][0, 0, q].tolist()) - {-1} == wanted
    expect_lists(lists, pattern, inputs)


def test_nan_is_no_score(engine: Engine) -> None:
    """A unit whose index is NaN is not chosen; the keys themselves are real."""
    pattern, module = pattern_of(INDEX), engine(INDEX)
    inputs = inputs_of(pattern, Shape(50, 50))
    inputs["k_index"][:, :, 20] = torch.nan
    with recorded(module, pattern) as lists:
        out = module.attention(**inputs)
    assert out.isfinite().all()
    seen = lists["chosen"][:, :, 20:]
    assert not (seen == 1).any()
    expect_lists(lists, pattern, inputs)


@pytest.mark.parametrize("by", ["max", "mean"])
def test_nan_of_one_head_is_no_score_of_the_group(engine: Engine, by: str) -> None:
    """The query at position 30 has NaN in one of two heads that score: only the unit that is forced is left."""
    body = (
        "causal index = stream(heads = 1, qk = 16, value = none) asks = query(heads = 2, dim = 16) "
        f"rank = dot(index, query = asks) chosen = top_k(2, score = rank, unit = max(16), share = {by}(group), "
        "force = last(1)) return attend(chosen)"
    )
    pattern, module = pattern_of(body), engine(body)
    inputs = inputs_of(pattern, Shape(50, 50, heads=2, kv_heads=1))
    inputs["asks"][:, 1, 30] = torch.nan
    with recorded(module, pattern) as lists:
        module.attention(**inputs)
    assert lists["chosen"][0, 0, 30].tolist() == [1, -1]
    assert (lists["chosen"][0, 0, 31] >= 0).all()
    expect_lists(lists, pattern, inputs)


def test_no_gradient_flows_through_a_choice(engine: Engine) -> None:
    pattern, module = pattern_of(INDEX), engine(INDEX)
    inputs = inputs_of(pattern, Shape(37, 37))
    given = {key: x.requires_grad_() for key, x in inputs.items()}
    grads = torch.autograd.grad(module.attention(**given).square().sum(), list(given.values()), allow_unused=True)
    found = dict(zip(given, grads, strict=True))
    assert found["k_index"] is None or found["k_index"].eq(0).all()
    chosen = dense.choices(pattern, {key: x.detach() for key, x in inputs.items()})["chosen"]
    fixed = torch.autograd.grad(module.attention(**given, chosen=chosen).square().sum(), [given[key] for key in "qkv"])
    assert all(torch.equal(found[key], grad) for key, grad in zip("qkv", fixed, strict=True))


def test_the_scored_branch_keeps_its_gradient_beside_a_choice(engine: Engine) -> None:
    """mass(coarse) chooses, coarse is a result too: its gradients are those with the lists fixed."""
    body = SELECTED["nsa"]
    pattern, module = pattern_of(body), engine(body)
    inputs = inputs_of(pattern, Shape(33, 33))
    chosen = dense.choices(pattern, inputs)["chosen"]
    found = generated(module, pattern, inputs)
    wanted = meant(pattern, {**inputs, "chosen": chosen})
    assert_same(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["nsa", "moba"])
def test_repeats_are_equal_to_the_bit(engine: Engine, name: str, dtype: torch.dtype) -> None:
    """Key 0 is chosen by all queries: several programs share its gradient."""
    if engine.name == "interpreted" and (name, dtype) != ("moba", torch.float32):
        pytest.skip("pairwise")
    body = SELECTED[name]
    pattern, module = pattern_of(body), engine(body)
    inputs = inputs_of(pattern, Shape(50, 50, heads=2), dtype)
    first, second = (generated(module, pattern, inputs) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first.parts[0], second.parts[0], strict=True))
    assert all(torch.equal(first.grads[key], second.grads[key]) for key in first.grads)


def test_a_unit_of_many_queries_is_shared_by_jobs(kernels: Engine) -> None:
    """16 heads leave a query per tile: unit 0 has one tile per query, more than a job holds."""
    body = by_rank("top_k(1, score = rank, share = sum(group), unit = sum(16), force = first(1))")
    pattern, module = pattern_of(body), kernels(body)
    assert JOB_TILES_INTERPRETED < 18
    inputs = inputs_of(pattern, Shape(18, 18, heads=16))
    assert_same(generated(module, pattern, inputs), meant(pattern, inputs))


def test_two_choices_are_passed_apart(engine: Engine) -> None:
    body = SELECTED["two choices"]
    pattern, module = pattern_of(body), engine(body)
    assert [found.name for found in lists_of(pattern)] == ["a", "b"]
    inputs = inputs_of(pattern, Shape(33, 33))
    lists = dense.choices(pattern, inputs)
    lists["b"] = lists["b"].flip(2)
    assert_same(generated(module, pattern, {**inputs, "b": lists["b"]}), meant(pattern, {**inputs, **lists}))
    assert {"a", "b"}.isdisjoint(differentiable(pattern, inputs))
