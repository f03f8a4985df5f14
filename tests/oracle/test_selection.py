"""Selected sets: weights of entries, reductions, forced units, ties, capacities, by hand and by published formulas."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor

from spdsl.ir.pattern import Choice, Grid, Logits, Mass, Query, Softmax, Stream, Term, Values
from spdsl.ir.rule import Size, Threshold, TopK
from spdsl.ir.symbols import K
from spdsl.oracle.dense import attention, choices, results, scores
from spdsl.oracle.selection import Scores, chosen, overlap, pooled
from spdsl.oracle.sizes import Sizes
from tests.oracle import built

P = Mass(built.coarse(32, 16))


def known(*shape: int) -> Scores:
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x, torch.ones(shape, dtype=torch.bool)


def picked(values: list[float], **how: Any) -> list[int]:
    """What one query chooses of units with these scores; -inf stands for none."""
    forced, banned = (how.pop(name, ()) for name in ("forced", "banned"))
    x = torch.tensor(values, dtype=torch.float64)
    number = torch.arange(len(values))
    sets = [torch.isin(number, torch.tensor(units, dtype=torch.long)).view(1, 1, 1, -1) for units in (forced, banned)]
    level, count = how.pop("level", None), how.pop("count", 0)
    rule = TopK(Size.of(count)) if level is None else Threshold(sympy.Float(level))
    choice = Choice("c", rule, 16, 1, "group", score=P, **how)
    seen = x.ne(-inf)
    found = chosen(choice, (torch.where(seen, x, 0.0).view(1, 1, 1, -1), seen.view(1, 1, 1, -1)), sets[0], ~sets[1])
    assert found.dtype == torch.int32
    return found.flatten().tolist()


def test_overlap_weights_of_nsa() -> None:
    """(32, 16, 64): 1, 2, 2, 2, 1 on the entries 4j - 1 to 4j + 3 of block j."""
    grid = Grid(32, 16)
    for j in range(4):
        wanted = dict(zip(range(4 * j - 1, 4 * j + 4), (1, 2, 2, 2, 1), strict=True))
        for entry in range(20):
            assert overlap(grid, entry, 64, j, 1024) / 16 == wanted.get(entry, 0)


@pytest.mark.parametrize(
    "width, stride, unit", [(32, 16, 64), (16, 16, 64), (16, 16, 16), (64, 16, 32), (48, 16, 32), (8, 4, 16)]
)
def test_sum_over_entries_is_equation_9_of_nsa(width: int, stride: int, unit: int) -> None:
    """From 0 on it reads p_slc[j] = sum over m < unit / d, n < width / d of p_cmp[unit / d * j + m - n]."""
    tokens = 6 * unit
    count = (tokens - width) // stride + 1
    p, seen = known(1, 1, 3, count)
    how = Choice("c", TopK(Size.of(1)), unit, 1, "group", score=P, unit_by="sum")
    found, _ = pooled((p, seen), how, Grid(width, stride), 1, Sizes(1, 1, 1, 3, tokens, tokens - 3, 0))
    for j in range(6):
        at = [unit // stride * j + m - n for m in range(unit // stride) for n in range(width // stride)]
        wanted = sum((p[..., i] for i in at if 0 <= i < count), torch.zeros(1, 1, 3))
        torch.testing.assert_close(found[..., j], wanted.double())


def test_max_over_entries_is_the_pooling_of_infllm_v2() -> None:
    """A window of 5 entries at a stride of 4 with a padding of 1, for (32, 16, 64)."""
    p, seen = known(1, 1, 7, 39)
    how = Choice("c", TopK(Size.of(1)), 64, 1, "group", score=P, unit_by="max")
    found, _ = pooled((p, seen), how, Grid(32, 16), 1, Sizes(1, 1, 1, 7, 640, 633, 0))
    wanted = torch.nn.functional.max_pool1d(p[0], 5, 4, 1)
    torch.testing.assert_close(found[0, ..., : wanted.shape[-1]], wanted)
    assert found.shape[-1] == 10


def test_reductions_run_heads_rows_entries_over_what_is_seen() -> None:
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]]], dtype=torch.float64)  # [1, 2, 2, 2]
    seen = torch.ones_like(x, dtype=torch.bool)
    sizes, grid = Sizes(1, 2, 1, 2, 4, 2, 0), Grid(2, 2)

    def one(seen: Tensor, **by: str) -> tuple[float, bool]:
        how = Choice("c", TopK(Size.of(1)), 4, 4, "group", score=P, heads_by=by["h"], rows_by=by["r"], unit_by=by["u"])
        value, any_seen = pooled((torch.where(seen, x, 0.0), seen), how, grid, 1, sizes)
        assert value.shape == (1, 1, 1, 1)
        return value.item(), bool(any_seen)

    assert one(seen, h="sum", r="sum", u="sum") == (36, True)
    assert one(seen, h="max", r="mean", u="sum") == ((5 + 7) / 2 + (6 + 8) / 2, True)
    assert one(seen, h="sum", r="max", u="mean") == (((3 + 7) + (4 + 8)) / 2, True)
    assert one(seen, h="mean", r="sum", u="max") == (10, True)  # entry 1: (2 + 6) / 2 + (4 + 8) / 2
    hidden = seen.clone()
    hidden[..., 0, 1] = False  # the first row does not see entry 1
    assert one(hidden, h="sum", r="mean", u="sum") == ((6 + 10) / 2 + 12, True)
    assert one(hidden, h="max", r="sum", u="mean") == ((12 + 8) / 2, True)
    hidden[:] = False
    assert not one(hidden, h="sum", r="max", u="max")[1]
    how = Choice("c", TopK(Size.of(1)), 4, 1, "group", score=P, unit_by="sum")
    with pytest.raises(ValueError, match="by no rule"):
        pooled((x, seen), how, grid, 1, sizes)


def test_the_best_units_in_rising_order() -> None:
    assert picked([0.1, 0.5, 0.2, 0.4], count=2) == [1, 3]
    assert picked([0.1, 0.5], count=4) == [0, 1, -1, -1]


def test_ties_go_to_the_lowest_index() -> None:
    assert picked([0.2, 0.3, 0.3, 0.3, 0.2], count=2) == [1, 2]
    assert picked([0.0] * 5, count=3) == [0, 1, 2]
    assert picked([0.0, -0.0, 0.0], count=1) == [0]


def test_forced_units_come_first_and_count() -> None:
    assert picked([0.1, 0.2, 0.9, 0.8], count=2, forced=(0,)) == [0, 2]
    assert picked([0.1, 0.2, 0.9, 0.8], count=2, forced=(3, 1, 0)) == [0, 1]
    assert picked([-inf, 0.2, 0.3], count=2, forced=(0,)) == [0, 2]
    assert picked([0.5, 0.2, 0.3], count=2, forced=(0,)) == [0, 2]


def test_no_score_is_no_candidate() -> None:
    assert picked([-inf, 0.1, -inf], count=3) == [1, -1, -1]
    assert picked([nan, 0.1, nan], count=2) == [1, -1]
    assert picked([nan, 0.1, 0.2], count=1, forced=(0,)) == [0]
    assert picked([inf, 0.1, 0.2], count=2) == [0, 2]
    assert picked([], count=2) == [-1, -1]


def test_within_bounds_forced_units_as_well() -> None:
    assert picked([0.9, 0.1, 0.8], count=2, forced=(1, 2), banned=(0, 1)) == [2, -1]


def test_threshold_takes_what_reaches_it_and_most_keeps_the_best() -> None:
    how = {"level": 0.3}
    assert picked([0.3, 0.29, 0.5, 0.4], **how) == [0, 2, 3, -1]
    assert picked([0.3, 0.29, 0.5, 0.4], most=2, **how) == [2, 3]
    assert picked([0.3, 0.1, 0.5, 0.4], most=2, forced=(1,), **how) == [1, 2]
    assert picked([0.3, -inf, nan], forced=(1,), **how) == [0, 1, -1]
    assert picked([-5.0, -inf], level=-inf, most=2) == [0, -1]


def test_least_of_a_threshold_takes_the_best_below_it() -> None:
    how = {"level": 0.3, "least": 2, "most": 3}
    assert picked([0.1, 0.0, 0.2, 0.1], **how) == [0, 2, -1]
    assert picked([0.1, 0.0, 0.4, 0.2], **how) == [2, 3, -1]
    assert picked([0.1, 0.5, 0.4, 0.2], **how) == [1, 2, -1]
    assert picked([0.3, 0.5, 0.4, 0.6], **how) == [1, 2, 3]
    assert picked([nan, 0.1, -inf, nan], **how) == [1, -1, -1]
    assert picked([nan, nan, nan], **how) == [-1, -1, -1]


def test_forced_units_count_towards_least_as_towards_k() -> None:
    how = {"level": 0.3, "least": 2, "most": 3}
    assert picked([0.1, 0.2, 0.1], forced=(0,), **how) == [0, 1, -1]
    assert picked([0.1, 0.2, 0.1], forced=(0, 2), **how) == [0, 2, -1]
    assert picked([0.1, 0.2, 0.1], forced=(0, 2), count=2) == [0, 2]
    assert picked([-inf, 0.2, 0.4, 0.5], forced=(0,), **how) == [0, 2, 3]
    assert picked([0.2, 0.1, 0.0], banned=(0,), **how) == [1, 2, -1]


def whole(**how: Any) -> dict[str, Tensor]:
    """The lists of a scored softmax over 64 tokens, entries (8, 4), units of 16."""
    score = Mass(built.coarse(8, 4))
    found = built.selected(built.top_k(3, score, 16, **how), width=8, stride=4)
    return choices(found, built.numbers(found, 64, heads=4, kv_heads=2))


def test_lists_of_nsa_hold_the_forced_blocks_and_only_begun_ones() -> None:
    found = built.nsa(count=4)
    lists = choices(found, built.numbers(found, 100, heads=4, kv_heads=2))["chosen"]
    assert lists.shape == (1, 2, 100, 4)
    for head in lists[0].tolist():
        for q, units in enumerate(head):
            real = [unit for unit in units if unit >= 0]
            assert real == sorted(set(real))
            assert units[len(real) :] == [-1] * (4 - len(real))
            assert {0, q // 16, max(0, q // 16 - 1)} <= set(real)
            # A unit has a score once one of its entries is closed: from token 16 * unit + 3 on, by entry 4 * unit - 1.
            scored = sum(16 * unit + 3 <= q or q // 16 == unit for unit in range(q // 16 + 1))
            assert len(real) == min(4, scored)
            assert all(16 * unit <= q for unit in real)


def test_lists_by_the_definition() -> None:
    """The chosen units of some rows from a softmax and a sort in plain torch."""
    found = built.nsa(width=8, stride=4, unit=16, count=4, by="mean")
    inputs = built.numbers(found, 150, heads=4, kv_heads=2)
    lists = choices(found, inputs)["chosen"]
    means = inputs["k_rough"][0].unfold(1, 8, 4).mean(-1)  # [2, E, dim]
    every = scores(found, inputs)["chosen"]
    for head in range(2):
        for q in range(40, 150, 7):
            closed = (q + 1 - 8) // 4 + 1
            p = torch.softmax(inputs["q"][0, 2 * head : 2 * head + 2, q] @ means[head, :closed].T / 2, -1).sum(0)
            best = {}
            for unit in range(10):
                inside = [
                    (i, len(set(range(4 * i, 4 * i + 8)) & set(range(16 * unit, 16 * unit + 16))))
                    for i in range(closed)
                ]
                best[unit] = sum(p[i].item() * tokens / 4 for i, tokens in inside)
            forced = {0, q // 16 - 1, q // 16}
            rest = sorted((unit for unit in best if best[unit] > 0 and unit not in forced), key=lambda u: -best[u])
            wanted = forced | set(rest[: 4 - len(forced)])
            assert set(lists[0, head, q].tolist()) - {-1} == wanted
            shown = every[0, head, q]
            assert [x if x > -inf else 0 for x in shown.tolist()] == pytest.approx(list(best.values()))


def test_share_says_who_has_a_list() -> None:
    assert whole()["chosen"].shape == (1, 2, 64, 3)
    assert whole(share="head", heads_by=None)["chosen"].shape == (1, 4, 64, 3)


def test_heads_of_another_query_score_for_the_groups() -> None:
    """An index of one key head and a query head per group; the logit of each token, the largest of a unit (MSA)."""
    rank = Softmax("rank", "q_index", (Term("index", built.CAUSAL),))
    chosen = built.top_k(2, Logits(rank), 8, heads_by=None, unit_by="max", force=built.last(1, 8))
    fine = Softmax("fine", "q", (Term("kv", sympy.And(built.member(chosen), built.CAUSAL)),))
    index = Stream("index", heads=1, value=Values.NONE)
    found = built.pattern((Query("q"), Stream("kv"), index, Query("q_index", heads=2), chosen), fine)
    inputs = built.numbers(found, 40, heads=4, kv_heads=2)
    lists = choices(found, inputs)["chosen"]
    logits = inputs["q_index"][0] @ inputs["k_index"][0, 0].T
    for head, q in [(0, 39), (1, 39), (0, 20), (1, 7)]:
        unit = {u: logits[head, q, 8 * u : min(8 * u + 8, q + 1)].max().item() for u in range(q // 8)}
        best = max(unit, key=lambda u: unit[u]) if unit else -1
        assert set(lists[0, head, q].tolist()) == {q // 8, best}
    out, _ = attention(found, inputs)
    seen = torch.isin(torch.arange(40) // 8, lists[0, 1, 39])
    row = torch.softmax((inputs["k"][0, 1] @ inputs["q"][0, 3, 39] / 2).masked_fill(~seen, -inf), 0)
    torch.testing.assert_close(out[0, 3, 39], row @ inputs["v"][0, 1])


def test_within_is_a_test_of_any_token() -> None:
    lists = whole(within=K >= 31, force=built.first(1, 16) | built.last(1, 16))["chosen"]
    assert set(lists.unique().tolist()) == {-1, 1, 2, 3}
    assert whole(within=K >= 32)["chosen"].unique().tolist() == [-1, 2, 3]


def test_rows_share_a_list_that_sees_what_their_last_row_sees() -> None:
    lists = whole(rows=32, rows_by="max", force=built.last(1, 16))["chosen"]
    assert lists.shape == (1, 2, 2, 3)
    assert lists[0, :, 0].tolist() == [[0, 1, -1]] * 2
    assert lists[0, :, 1].eq(3).any(1).all()


def test_all_units_and_all_tokens_are_dense() -> None:
    score = Mass(built.coarse(8, 4))
    found = built.selected(built.top_k(7, score, 16, force=built.last(1, 16)), width=8, stride=4)
    inputs = {name: x.requires_grad_() for name, x in built.numbers(found, 100, heads=4, kv_heads=2).items()}
    dense = built.pattern((Query("q"), Stream("kv")), Softmax("full", "q", (Term("kv", built.CAUSAL),)))
    answers = attention(found, inputs), attention(dense, inputs)
    grads = [torch.autograd.grad(out.square().sum() + lse.sum(), [inputs[x] for x in "qkv"]) for out, lse in answers]
    for x, y in zip((*answers[0], *grads[0]), (*answers[1], *grads[1]), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_given_lists_are_sets_and_replace_the_rule() -> None:
    found = built.nsa()
    inputs = built.numbers(found, 60, heads=4, kv_heads=2)
    wanted = attention(found, inputs)
    lists = choices(found, inputs)["chosen"]
    nothing = torch.full_like(lists[..., :1], -1)
    for form in (lists, lists.long(), lists.flip(-1), torch.cat([lists[..., :2], nothing, lists, nothing], -1)):
        for x, y in zip(attention(found, {**inputs, "chosen": form}), wanted, strict=True):
            assert torch.equal(x, y)
    other = attention(found, {**inputs, "chosen": nothing})
    torch.testing.assert_close(other[1][..., 0], wanted[1][..., 0])
    assert other[1][..., 1].eq(-inf).all()
    assert torch.equal(choices(found, {**inputs, "chosen": nothing})["chosen"], lists)


def test_no_gradient_runs_through_a_choice() -> None:
    found = built.nsa()
    inputs = {name: x.requires_grad_() for name, x in built.numbers(found, 40).items()}
    lists = choices(found, inputs)
    assert not lists["chosen"].requires_grad
    grads = [
        torch.autograd.grad(attention(found, {**inputs, **more})[0].square().sum(), list(inputs.values()))
        for more in ({}, lists)
    ]
    assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))
    assert all(x.ne(0).any() for x in grads[0])
    # Through the selected branch alone the compression gets nothing.
    fine = results(built.pattern(found.inputs, found.softmaxes()[1]), inputs)[0]
    assert isinstance(fine, tuple)
    assert found.softmaxes()[1].name == "fine"
    rest = torch.autograd.grad(fine[0].sum(), [inputs["k_rough"], inputs["entries_k_up"]], allow_unused=True)
    assert rest == (None, None)


def test_later_queries_alone_choose_the_same() -> None:
    found = built.nsa()
    inputs = built.numbers(found, 61, heads=4, kv_heads=2)
    part = {name: x[:, :, -9:] if name in ("q", "gates") else x for name, x in inputs.items()}
    assert torch.equal(choices(found, part)["chosen"], choices(found, inputs)["chosen"][:, :, -9:])
    for x, y in zip(attention(found, part), attention(found, inputs), strict=True):
        torch.testing.assert_close(x, y[:, :, -9:])


def test_queries_before_the_first_key_choose_nothing() -> None:
    found = built.nsa()
    inputs = built.numbers(found, 20, 9)
    lists = choices(found, inputs)["chosen"]
    assert lists[0, 0, :11].eq(-1).all()
    assert lists[0, 0, 11].tolist() == [0, -1, -1, -1]
    assert attention(found, inputs)[1][:, :, :11].eq(-inf).all()


def test_a_nan_key_leaves_the_forced_units() -> None:
    found = built.nsa(by="mean")
    inputs = built.numbers(found, 100)
    inputs["k_rough"][:, :, 50] = nan
    lists = choices(found, inputs)["chosen"][0, 0]
    assert lists[99].tolist() == [0, 5, 6, -1]  # the softmax of the row is NaN
    assert lists[50].tolist() == [0, 1, 2, 3]  # entry 11, tokens 44 to 51, is not closed yet
