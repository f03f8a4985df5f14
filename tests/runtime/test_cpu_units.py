"""Attention of queries to the units they chose, against a dense float64 masked softmax written here."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from spdsl.runtime.cpu import cpu_unit_tiles
from spdsl.runtime.cpu.cpu import sink_gradient
from spdsl.runtime.cpu.cpu_short_units import units_together
from spdsl.runtime.cpu.cpu_tiles import Logits
from spdsl.runtime.cpu.cpu_unit_tiles import UnitTest
from spdsl.runtime.cpu.cpu_units import units_backward, units_forward

BOUND = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(params=["one block", "small blocks"])
def _sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is, and with blocks, chunks and tiles that a few dozen rows fill several times."""
    if request.param == "small blocks":
        monkeypatch.setattr(cpu_unit_tiles, "_UNIT_RESULTS", 1000)
        monkeypatch.setattr(cpu_unit_tiles, "_UNIT_LOGITS", 200)
        monkeypatch.setattr(cpu_unit_tiles, "_UNIT_TILE", 8)


class Case(NamedTuple):
    batch: int = 2
    heads: int = 4
    lists: int = 2
    kv_heads: int = 2
    rows: int = 37
    keys: int = 53
    unit: int = 8
    count: int = 3
    qk: int = 8
    v: int = 6
    origin: int = 16
    softcap: float | None = None
    bias: bool = False
    sink: bool = False
    dlse: bool = False
    by_head: bool = False  # a test that differs by head


def random_lists(case: Case) -> Tensor:
    """Distinct ascending units with -1 at the end; some rows choose nothing."""
    units = -(-case.keys // case.unit)
    shape = (case.batch, case.lists, case.rows)
    order = torch.rand(*shape, units + case.count).argsort(-1)[..., : case.count]  # numbers past the units: none
    order = order.masked_fill(torch.rand(*shape, 1) < 0.1, units).clamp(max=units).sort(-1).values
    return order.masked_fill(order == units, -1).int()


def visible_of(case: Case) -> UnitTest:
    """Causal, with holes; every head has its own where `by_head`."""

    def visible(q: Tensor, k: Tensor, h: Tensor) -> Tensor:
        return (k <= q) & ((q + 3 * k + (h if case.by_head else 0)) % 5 != 0)

    return visible


def bias_of(q: Tensor, k: Tensor, h: Tensor) -> Tensor:
    return (torch.sin(0.3 * q + 0.7 * k) * (h + 1)).masked_fill((q + k) % 11 == 0, -math.inf)


def mask_of(case: Case, chosen: Tensor) -> Tensor:
    """[B, Hq, N, M], pair by pair from the lists."""
    q = case.origin + torch.arange(case.rows).view(1, -1, 1)
    k, h = torch.arange(case.keys).view(1, 1, -1), torch.arange(case.heads).view(-1, 1, 1)
    member = (chosen.unsqueeze(-1) == (torch.arange(case.keys) // case.unit)).any(3)
    member = member.repeat_interleave(case.heads // case.lists, 1)
    seen = visible_of(case)(q, k, h)
    return member & (seen & ((bias_of(q, k, h) > -math.inf) if case.bias else True))


def dense(case: Case, mask: Tensor, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    group = case.heads // case.kv_heads
    s = case.qk**-0.5 * q @ k.repeat_interleave(group, 1).transpose(2, 3)
    s = s if case.softcap is None else case.softcap * torch.tanh(s / case.softcap)
    if case.bias:
        rows, keys = case.origin + torch.arange(case.rows).view(1, -1, 1), torch.arange(case.keys).view(1, 1, -1)
        s = s + bias_of(rows, keys, torch.arange(case.heads).view(-1, 1, 1)).double()
    s = s.masked_fill(~mask, -math.inf)
    if sink is not None:
        s = torch.cat([s, sink.view(1, -1, 1, 1).expand(*s.shape[:3], 1)], 3)
    empty = (s == -math.inf).all(-1, keepdim=True)
    lse = s.masked_fill(empty, 0.0).logsumexp(-1).masked_fill(empty.squeeze(-1), -math.inf)
    p = torch.exp(s - lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1))
    return p[..., : case.keys] @ v.repeat_interleave(group, 1), lse


def inputs_of(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(case.batch, case.heads, case.rows, case.qk)
    k, v = (torch.randn(case.batch, case.kv_heads, case.keys, dim) for dim in (case.qk, case.v))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def form_of(case: Case) -> Logits:
    return Logits(case.qk**-0.5, case.softcap, case.origin)


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    same = got.double() == want.double()  # infinities
    error = (got.double() - want.double()).masked_fill(same, 0.0).abs()
    assert bool((error <= BOUND[dtype] * (1 + want.double().abs())).all()), float(error.max())


def check(case: Case, dtype: torch.dtype = torch.float64, chosen: Tensor | None = None) -> None:
    torch.manual_seed(0)
    chosen = random_lists(case) if chosen is None else chosen
    inputs = inputs_of(case, dtype)
    sink = torch.randn(case.heads).to(dtype) if case.sink else None
    exact = [x.double().requires_grad_() for x in inputs]
    exact_sink = None if sink is None else sink.double().requires_grad_()
    mask = mask_of(case, chosen)
    want_out, want_lse = dense(case, mask, *exact, exact_sink)
    tests = (visible_of(case), bias_of if case.bias else None, form_of(case))
    out, lse = units_forward(*inputs, chosen, case.unit, *tests, sink)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close(out, want_out, dtype)
    close(lse, want_lse, dtype)

    dout = torch.randn(out.shape).to(dtype)
    dlse = torch.randn(lse.shape, dtype=lse.dtype) if case.dlse else None
    total = (want_out * dout.double()).sum()
    if dlse is not None:
        dlse = dlse.masked_fill(lse == -math.inf, 0.0)
        total = total + (want_lse.masked_fill(want_lse == -math.inf, 0.0) * dlse.double()).sum()
    leaves = [*exact, *([] if exact_sink is None else [exact_sink])]
    wants = torch.autograd.grad(total, leaves)
    grads = units_backward(dout, dlse, *inputs, out, lse, chosen, case.unit, *tests)
    for got, want, x in zip(grads, wants, inputs, strict=False):
        assert got.dtype == x.dtype
        assert got.shape == x.shape
        close(got, want, dtype)
    if sink is not None:
        close(sink_gradient(dout, dlse, out, lse, sink), wants[3], dtype)
    again = units_backward(dout, dlse, *inputs, out, lse, chosen, case.unit, *tests)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


CASES = {
    "plain": Case(),
    "group of 1": Case(heads=2, lists=2, kv_heads=2),
    "group of 3": Case(heads=3, lists=1, kv_heads=1),
    "group of 5": Case(heads=10, lists=2, kv_heads=2),
    "group of 16": Case(heads=16, lists=1, kv_heads=1, rows=9),
    "a list per query head": Case(heads=4, lists=4, kv_heads=2),
    "lists between": Case(heads=8, lists=4, kv_heads=2, rows=11),
    "own tests by head": Case(heads=6, lists=2, kv_heads=1, by_head=True),
    "unit of one key": Case(unit=1, count=7),
    "unit beyond the keys": Case(unit=100, count=2),
    "more places than units": Case(unit=16, count=9),
    "units without a rest": Case(keys=48),
    "one row": Case(rows=1, origin=52),
    "rows before the keys": Case(origin=0, keys=20),
    "softcap": Case(softcap=0.8),
    "bias": Case(bias=True),
    "sink": Case(sink=True),
    "gradient of the lse": Case(dlse=True),
    "all of it": Case(heads=6, lists=2, kv_heads=1, softcap=0.8, bias=True, sink=True, dlse=True, by_head=True),
}


@pytest.mark.usefixtures("_sizes")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_forward_and_gradients_equal_the_dense_softmax(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("per", [1, 2, 16, 64])
@pytest.mark.parametrize(
    "case", [Case(), Case(unit=1, count=9, keys=77), Case(unit=3, softcap=0.8, bias=True, sink=True)]
)
def test_short_units_that_are_taken_together(per: int, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """By as many as one likes; lists need no order."""
    monkeypatch.setattr(cpu_unit_tiles, "units_together", lambda *sizes: per)
    check(case, chosen=random_lists(case)[..., torch.randperm(case.count)])


def test_how_many_units_are_taken_together() -> None:
    """Where lists hold much of a sequence, and of units that are short."""
    assert [units_together(1, n, 8192) for n in (16, 64, 256, 2048, 8192)] == [1, 1, 64, 64, 64]
    assert [units_together(unit, 512, 8192) for unit in (2, 8, 16, 64)] == [64, 64, 1, 1]
    assert units_together(1, 64, 1 << 20) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_other_types(dtype: torch.dtype) -> None:
    check(Case(softcap=2.0, sink=True, dlse=True), dtype)
    check(Case(heads=6, lists=6, kv_heads=2, bias=True), dtype)


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("width", [0, 3])
def test_rows_that_choose_nothing(width: int, sink: bool) -> None:
    case = Case(sink=sink, dlse=True)
    check(case, chosen=torch.full((case.batch, case.lists, case.rows, width), -1, dtype=torch.int32))


@pytest.mark.parametrize("empty", [{"rows": 0}, {"keys": 0}, {"batch": 0}], ids=str)
def test_sizes_of_zero(empty: dict[str, int]) -> None:
    case = Case(**empty)
    q, k, v = inputs_of(case, torch.float64)
    chosen = torch.full((case.batch, case.lists, case.rows, 3), -1, dtype=torch.int32)
    out, lse = units_forward(q, k, v, chosen, 8, visible_of(case), None, form_of(case), None)
    assert out.shape == (case.batch, case.heads, case.rows, case.v)
    assert not out.any()
    assert bool((lse == -math.inf).all())
    grads = units_backward(out, None, q, k, v, out, lse, chosen, 8, visible_of(case), None, form_of(case))
    assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]
    assert not any(bool(x.any()) for x in grads)


@pytest.mark.usefixtures("_sizes")
@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_what_no_row_sees_does_not_leak(odd: float) -> None:
    case = Case(keys=53, unit=8)
    torch.manual_seed(0)
    chosen = random_lists(case)
    mask = mask_of(case, chosen).unflatten(1, (case.kv_heads, -1))
    unseen = ~mask.any((2, 3))
    assert bool((unseen & (torch.arange(53) < 48)).any())
    q, k, v = inputs_of(case, torch.float64)
    tests = (visible_of(case), None, form_of(case))
    want = units_forward(q, k, v, chosen, 8, *tests, None)
    wants = units_backward(want[0], want[1].exp(), q, k, v, *want, chosen, 8, *tests)
    k, v = (x.masked_fill(unseen.unsqueeze(-1), odd) for x in (k, v))
    got = units_forward(q, k, v, chosen, 8, *tests, None)
    grads = units_backward(want[0], want[1].exp(), q, k, v, *got, chosen, 8, *tests)
    for a, b in zip((*got, *grads), (*want, *wants), strict=True):
        close(a, b, torch.float64)


@pytest.mark.usefixtures("_sizes")
def test_nan_reaches_the_rows_that_see_it_and_no_other() -> None:
    case = Case()
    torch.manual_seed(1)
    chosen = random_lists(case)
    mask = mask_of(case, chosen)
    q, k, v = inputs_of(case, torch.float64)
    k[1, 0, 20], v[0, 1, 9] = math.nan, math.nan
    sees = torch.zeros(case.batch, case.heads, case.rows, dtype=torch.bool)
    sees[1, :2], sees[0, 2:] = mask[1, :2, :, 20], mask[0, 2:, :, 9]
    assert bool(sees.any())
    tests = (visible_of(case), None, form_of(case))
    out, lse = units_forward(q, k, v, chosen, 8, *tests, None)
    assert torch.equal(out.isnan().any(-1), sees)
    dq, dk, dv = units_backward(torch.ones_like(out), None, q, k, v, out, lse, chosen, 8, *tests)
    assert torch.equal(dq.isnan().any(-1), sees)
    reached = (mask & sees.unsqueeze(-1)).unflatten(1, (case.kv_heads, -1)).any((2, 3))
    assert not bool((dk.isnan().any(-1) & ~reached).any())
    assert not bool((dv.isnan().any(-1) & ~reached).any())


@pytest.mark.usefixtures("_sizes")
@pytest.mark.parametrize("batch", [1, 3])
def test_tests_that_differ_by_batch_row(batch: int) -> None:
    """As a tensor of the caller makes them: [B, 1, rows, keys]."""
    case = Case(batch=batch, bias=True)
    torch.manual_seed(4)
    chosen = random_lists(case)
    table = torch.rand(batch, 1, case.rows, case.keys) < 0.6
    at = torch.arange(batch).view(-1, 1, 1, 1)
    tests = (lambda q, k, h: table[at, 0, q - case.origin, k], lambda q, k, h: bias_of(q, k, h)[None], form_of(case))
    inputs = inputs_of(case, torch.float64)
    exact = [x.clone().requires_grad_() for x in inputs]
    member = (chosen.unsqueeze(-1) == (torch.arange(case.keys) // case.unit)).any(3)
    rows, keys = case.origin + torch.arange(case.rows).view(-1, 1), torch.arange(case.keys)
    shown = bias_of(rows, keys, torch.zeros(1, 1, 1)) > -math.inf
    mask = member.repeat_interleave(case.heads // case.lists, 1) & table & shown
    want, _ = dense(case, mask, *exact, None)
    out, lse = units_forward(*inputs, chosen, case.unit, *tests, None)
    close(out, want, torch.float64)
    dout = torch.randn(out.shape, dtype=torch.float64)
    wants = torch.autograd.grad((want * dout).sum(), exact)
    grads = units_backward(dout, None, *inputs, out, lse, chosen, case.unit, *tests)
    for got, expected in zip(grads, wants, strict=True):
        close(got, expected, torch.float64)


def test_gradcheck() -> None:
    case = Case(
        batch=1, heads=2, lists=1, kv_heads=1, rows=5, keys=9, unit=4, count=2, qk=3, v=2, origin=4, softcap=2.0
    )
    torch.manual_seed(2)
    chosen = random_lists(case)
    tests = (visible_of(case), None, form_of(case))

    class Attend(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):  # type: ignore[no-untyped-def]
            out, lse = units_forward(q, k, v, chosen, case.unit, *tests, None)
            ctx.save_for_backward(q, k, v, out, lse)
            return out, lse.masked_fill(lse == -math.inf, 0.0)

        @staticmethod
        def backward(ctx, dout, dlse):  # type: ignore[no-untyped-def]
            return units_backward(dout, dlse, *ctx.saved_tensors, chosen, case.unit, *tests)

    leaves = [x.requires_grad_() for x in inputs_of(case, torch.float64)]
    assert torch.autograd.gradcheck(Attend.apply, leaves)


def test_the_order_of_a_list_changes_nothing_but_rounding() -> None:
    case = Case(unit=4, count=6)
    torch.manual_seed(3)
    chosen = random_lists(case)
    q, k, v = inputs_of(case, torch.float64)
    tests = (visible_of(case), None, form_of(case))
    found = [units_forward(q, k, v, lists, 4, *tests, None) for lists in (chosen, chosen.flip(-1))]
    for a, b in zip(*found, strict=True):
        close(a, b, torch.float64)
