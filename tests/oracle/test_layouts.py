"""Packed and padded sequences are separate calls; example values of what patterns read."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from spdsl.ir.pattern import Mass, Pooled
from spdsl.oracle.dense import choices, results
from spdsl.oracle.examples import example_inputs
from spdsl.oracle.layouts import cut, packed, packed_choices, padded
from spdsl.oracle.sizes import Sizes
from spdsl.oracle.sketch import sketches
from tests.oracle import built

ENDS = [0, 37, 37, 38, 44, 90]  # one is empty, one has a token, one is shorter than an entry


def test_packed_sequences_are_separate_calls() -> None:
    found = built.nsa()
    inputs = built.numbers(found, 90, heads=4, kv_heads=2)
    ((out, lse),) = packed(found, inputs, ENDS)
    lists = packed_choices(found, inputs, ENDS)["chosen"]
    assert out.shape == (1, 4, 90, 4)
    assert lists.shape == (1, 2, 90, 4)
    vectors = [name for name, x in inputs.items() if x.dim() == 4 and not name.startswith("entries")]
    for start, end in pairwise(ENDS):
        if start < end:
            own = {name: x[:, :, start:end] if name in vectors else x for name, x in inputs.items()}
            ((alone, alone_lse),) = results(found, own)
            assert torch.equal(out[:, :, start:end], alone)
            assert torch.equal(lse[:, :, start:end], alone_lse)
            assert torch.equal(lists[:, :, start:end], choices(found, own)["chosen"])
            assert lists[0, :, start].tolist() == [[0, -1, -1, -1]] * 2  # units count from the sequence's first key
    ((again, _),) = packed(found, {**inputs, "chosen": lists}, ENDS)
    assert torch.equal(out, again)


def test_lists_of_packed_sequences_count_units_from_their_first_key() -> None:
    """Where units divide the lengths: one long call with the lists moved by the units before means the same."""
    found = built.selected(built.top_k(2, Mass(built.coarse(4, 4)), 16), width=4, stride=4)
    inputs = built.numbers(found, 96)
    ends = [0, 32, 96]
    ((out, lse),) = packed(found, inputs, ends)
    lists = packed_choices(found, inputs, ends)["chosen"]
    moved = torch.where((lists >= 0) & (torch.arange(96).view(1, 1, -1, 1) >= 32), lists + 2, lists)
    ((whole, whole_lse),) = results(found, {**inputs, "chosen": moved})
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(lse, whole_lse)


def test_gradients_of_packed_sequences_reach_every_weight() -> None:
    found = built.nsa()
    inputs = {name: x.requires_grad_() for name, x in built.numbers(found, 90).items()}
    ((out, _),) = packed(found, inputs, ENDS)
    total = torch.zeros_like(inputs["entries_k_up"])
    for start, end in pairwise(ENDS):
        if start < end:
            ((part, _),) = results(found, cut(found, inputs, start, end))
            loss, weights = part.square().sum(), [inputs["entries_k_up"]]
            (grad,) = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
            total = total if grad is None else total + grad  # a part too short for an entry reads no weight
    (grad,) = torch.autograd.grad(out.square().sum(), [inputs["entries_k_up"]])
    torch.testing.assert_close(grad, total)


def test_padded_rows_are_their_last_tokens() -> None:
    found = built.nsa()
    inputs = built.numbers(found, 40, batch=3)
    answers = padded(found, inputs, [40, 0, 21])
    assert answers[1] is None
    vectors = [name for name, x in inputs.items() if x.dim() == 4 and not name.startswith("entries")]
    for row, length in ((0, 40), (2, 21)):
        own = {name: x[row : row + 1, :, 40 - length :] if name in vectors else x for name, x in inputs.items()}
        answer = answers[row]
        assert answer is not None
        for x, y in zip(answer[0], results(found, own)[0], strict=True):
            assert torch.equal(x, y)


def test_scores_of_sequences_with_other_units_are_no_tensor() -> None:
    mass = Mass(built.coarse(8, 4))
    found = built.selected(
        built.top_k(2, mass, 16), Pooled(mass, 16, 1, "group", heads_by="sum", unit_by="sum"), width=8, stride=4
    )
    with pytest.raises(ValueError, match="different units"):
        packed(found, built.numbers(found, 40), [0, 20, 40])


def test_examples_are_weights_and_no_derived_arguments() -> None:
    found, sizes = built.nsa(), Sizes(1, 4, 2, 64, 64, 0, 0)
    inputs, notes = example_inputs(found, sizes)
    assert set(inputs) == {f"entries_{side}_{role}" for side in "kv" for role in ("position", "up", "down")}
    assert inputs["entries_k_up"].shape == (2, 8, 16, 16)
    assert 0.05 < inputs["entries_k_up"].std() < 0.2
    assert not torch.equal(inputs["entries_k_up"], inputs["entries_v_up"])
    assert len(notes) == len(inputs)
    for name, x in example_inputs(found, sizes)[0].items():
        assert torch.equal(x, inputs[name])


def test_example_lists_hold_the_forced_units() -> None:
    lists = example_inputs(built.nsa(), Sizes(1, 4, 2, 100, 100, 0, 0), choices=True)[0]["chosen"]
    assert lists.shape == (1, 2, 100, 4)
    for head in lists[0].tolist():
        for q, units in enumerate(head):
            real = [unit for unit in units if unit >= 0]
            assert len(real) == len(set(real)) == min(4, q // 16 + 1)
            assert {0, q // 16, max(0, q // 16 - 1)} <= set(real)


def test_sketches_of_entries_and_selected_sets() -> None:
    found, _ = sketches(built.nsa(), 64)
    assert [sketch.name for sketch in found][:1] == ["coarse, stream entries"]
    rough = found[0]
    assert rough.mask.shape == (64, 64)
    assert rough.seen == sum(max(0, (q + 1 - 8) // 4 + 1) for q in range(64))
    assert rough.mask[11].tolist() == [True] * 8 + [False] * 56
    fine = next(sketch for sketch in found if sketch.name.startswith("fine"))
    assert fine.seen == sum(q + 1 for q in range(64))  # four units of 16 are all of them
