"""Scores and divergences as further results."""

from __future__ import annotations

from math import inf, log

import pytest
import torch
from torch import Tensor

from spdsl.ir.pattern import Kl, Logits, Mass, Pooled, Query, Softmax, Stream, Term, Values
from spdsl.oracle.dense import results, scores
from spdsl.oracle.softmax import divergence
from tests.oracle import built


def test_a_pooled_score_is_what_a_choice_selects_by() -> None:
    mass = Mass(built.coarse(8, 4))
    shown = Pooled(mass, 16, 1, "group", heads_by="sum", unit_by="sum")
    found = built.selected(built.top_k(2, mass, 16), shown, width=8, stride=4)
    inputs = {name: x.requires_grad_() for name, x in built.numbers(found, 50, heads=4, kv_heads=2).items()}
    _, value = results(found, inputs)
    assert isinstance(value, Tensor)
    chosen_by = scores(found, inputs)["chosen"]
    assert value.shape == (1, 2, 50, 4)
    assert torch.equal(value.detach(), chosen_by.clamp(min=0))  # 0 where nothing is visible
    assert chosen_by[0, 0, 7].tolist()[1:] == [-inf] * 3
    # Each entry lies within the units and weighs width / stride = 2 in all; both heads of a group have mass 1.
    torch.testing.assert_close(value.detach()[0, :, 7:].sum(-1), torch.full((2, 43), 4.0, dtype=torch.float64))
    (grad,) = torch.autograd.grad(value.sum(), [inputs["k"]])
    assert grad.isfinite().all()
    assert grad.ne(0).any()


def test_a_pooled_logit_without_an_entry_is_minus_infinity() -> None:
    rough = built.coarse(4, 4)
    shown = Pooled(Logits(rough), 4, 1, "head")
    found = built.pattern((Query("q"), Stream("kv"), built.entries(4, 4, "mean")), rough, shown)
    inputs = built.numbers(found, 10)
    _, value = results(found, inputs)
    assert isinstance(value, Tensor)
    means = inputs["k"][0, 0, :8].view(2, 4, 4).mean(1)
    wanted = inputs["q"][0] @ means.T / 2
    assert value.shape == (1, 2, 10, 3)
    assert value[0, :, :3].eq(-inf).all()
    torch.testing.assert_close(value[0, :, 3:7, 0], wanted[:, 3:7, 0])
    torch.testing.assert_close(value[0, :, 7:, :2], wanted[:, 7:])
    assert value[..., 2].eq(-inf).all()  # the tokens 8 and 9 are no whole cell


def test_the_target_of_seer_attention_is_a_map_of_maxima() -> None:
    full = Softmax("full", "q", (Term("kv", built.CAUSAL),))
    shown = Pooled(Mass(full), 4, 4, "head", rows_by="max", unit_by="max")
    found = built.pattern((Query("q"), Stream("kv")), full, shown)
    inputs = built.numbers(found, 12)
    _, value = results(found, inputs)
    logits = inputs["q"] @ inputs["k"].transpose(2, 3) / 2
    p = torch.softmax(logits.masked_fill(~torch.ones(12, 12, dtype=torch.bool).tril(), -inf), -1)
    torch.testing.assert_close(value, torch.nn.functional.max_pool2d(p[0], 4).unsqueeze(0))


def test_divergence_by_hand() -> None:
    target = torch.tensor([[log(1.0), log(3.0), -inf], [-inf, -inf, -inf], [0.0, -inf, -inf]], dtype=torch.float64)
    score = torch.tensor([[log(2.0), log(2.0), -inf], [0.0, 0.0, 0.0], [-inf, 0.0, 0.0]], dtype=torch.float64)
    found = divergence(target, score)
    assert found.tolist() == [pytest.approx(0.25 * log(0.25 / 0.5) + 0.75 * log(0.75 / 0.5)), 0, inf]


def test_kl_trains_the_score_alone_over_what_the_target_sees() -> None:
    """The loss of MSA's index (arXiv 2606.13392): KL(mean mass of a group || softmax of the index logits)."""
    full = Softmax("full", "q", (Term("kv", built.CAUSAL & (built.Q - built.K < 5)),))
    rank = Softmax("rank", "q_index", (Term("index", built.CAUSAL),))
    kl = Kl(
        Pooled(Mass(full), 1, 1, "group", heads_by="mean"),
        Pooled(Logits(rank), 1, 1, "group"),
    )
    index = Stream("index", heads=1, value=Values.NONE)
    found = built.pattern((Query("q"), Stream("kv"), index, Query("q_index", heads=2)), full, kl)
    inputs = {name: x.requires_grad_() for name, x in built.numbers(found, 9, heads=4, kv_heads=2).items()}
    _, value = results(found, inputs)
    assert isinstance(value, Tensor)
    position = torch.arange(9)
    seen = (position <= position[:, None]) & (position[:, None] - position < 5)
    k = inputs["k"][0].repeat_interleave(2, 0)
    p = torch.softmax((inputs["q"][0] @ k.transpose(1, 2) / 2).masked_fill(~seen, -inf), -1).view(2, 2, 9, 9).mean(1)
    s = (inputs["q_index"][0] @ inputs["k_index"][0].transpose(1, 2) / 2).masked_fill(~seen, -inf).log_softmax(-1)
    wanted = torch.nn.functional.kl_div(s.masked_fill(~seen, 0), p.detach(), reduction="none").sum(-1)
    torch.testing.assert_close(value[0], wanted)
    names = ["q_index", "k_index", "q", "k"]
    got = torch.autograd.grad(value.sum(), [inputs[x] for x in names], allow_unused=True)
    meant = torch.autograd.grad(wanted.sum(), [inputs[x] for x in names[:2]])
    for x, y in zip(got[:2], meant, strict=True):
        torch.testing.assert_close(x, y)
    assert got[2:] == (None, None)


def test_kl_of_two_probabilities_and_of_rows_that_see_nothing() -> None:
    rough = built.coarse(4, 4)
    other = Softmax("other", "ask", (Term("entries", built.closed(4, 4)),))
    sides = [Pooled(Mass(one), 4, 1, "head") for one in (rough, other)]
    inputs_of = (Query("q"), Query("ask"), Stream("kv"), built.entries(4, 4, "mean"))
    found = built.pattern(inputs_of, rough, Kl(sides[0], sides[1]), Kl(sides[0], sides[0]))
    inputs = {name: x.requires_grad_() for name, x in built.numbers(found, 10).items()}
    _, value, zero = results(found, inputs)
    assert isinstance(value, Tensor)
    assert isinstance(zero, Tensor)
    torch.testing.assert_close(zero, torch.zeros_like(zero))
    assert value[:, :, :7].eq(0).all()  # no entry, then one that has all the mass
    assert value[:, :, 7:].gt(0).all()
    grads = torch.autograd.grad(value.sum(), [inputs["ask"], inputs["k"]])
    assert all(x.isfinite().all() and x.ne(0).any() for x in grads)
