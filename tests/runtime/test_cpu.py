"""The CPU path against a dense float64 softmax written here, for both engines."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from spdsl.runtime.cpu import cpu, cpu_tiles
from spdsl.runtime.cpu.cpu import sink_gradient, sparse_backward, sparse_forward
from spdsl.runtime.cpu.cpu_tiles import Logits, Part

Ranges = list[tuple[int, int, bool]]
Test = Callable[[Tensor, Tensor], Tensor]
BOUND = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles and pieces that a few dozen tokens fill several times."""
    monkeypatch.setattr(cpu_tiles, "_TILE_ROWS", 16)
    monkeypatch.setattr(cpu_tiles, "_KEYS_PER_CALL", 40)


@pytest.fixture(params=["flash", "plain"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each engine by itself where both can do the work."""
    if request.param == "plain":
        monkeypatch.setattr(cpu, "flash_forward", cpu.plain_forward)
        monkeypatch.setattr(cpu, "flash_backward", cpu.plain_backward)


def ranges_of(mask: Tensor) -> Callable[[int, int], Ranges]:
    """Exact visits of a dense mask [rows, keys]: maximal ranges of keys that are full, or partly visible."""

    def visits(first: int, end: int) -> Ranges:
        some, full = mask[first:end].any(0).tolist(), mask[first:end].all(0).tolist()
        found: Ranges = []
        for j in range(len(some)):
            if some[j] and found and found[-1][1:] == (j, full[j]):
                found[-1] = (found[-1][0], j + 1, full[j])
            elif some[j]:
                found.append((j, j + 1, full[j]))
        return found

    return visits


def looked_up(table: Tensor, origin: int) -> Test:
    """A function of positions that reads a table [..., rows, keys]."""
    return lambda i, j: table[..., i - origin, j]


def part_of(k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None = None, origin: int = 0) -> Part:
    flat = mask.reshape(-1, *mask.shape[-2:])
    some = flat.any(0)

    def visits(first: int, end: int) -> Ranges:
        every = flat.all(0)[first:end]
        return [(a, b, bool(every[:, a:b].all())) for a, b, _ in ranges_of(some)(first, end)]

    return Part(k, v, visits, looked_up(mask, origin), None if bias is None else looked_up(bias, origin))


def dense(
    q: Tensor,
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor | None]],
    scale: float,
    softcap: float | None,
    sink: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The meaning: every logit, one softmax over all parts and the sink. parts: (k, v, mask, bias)."""
    logits, values = [], []
    for k, v, mask, bias in parts:
        group = q.shape[1] // k.shape[1]
        s = scale * q @ k.repeat_interleave(group, 1).transpose(2, 3)
        s = s if softcap is None else softcap * torch.tanh(s / softcap)
        s = s if bias is None else s + bias
        logits.append(s.masked_fill(~mask, -math.inf))
        values.append(v.repeat_interleave(group, 1))
    s, v = torch.cat(logits, 3), torch.cat(values, 2)
    if sink is not None:
        s = torch.cat([s, sink.view(1, -1, 1, 1).expand(*s.shape[:3], 1)], 3)
        v = torch.cat([v, v.new_zeros(*v.shape[:2], 1, v.shape[3])], 2)
    empty = (s == -math.inf).all(-1, keepdim=True)
    lse = s.masked_fill(empty, 0.0).logsumexp(-1).masked_fill(empty.squeeze(-1), -math.inf)
    p = torch.exp(s - lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1))
    return p @ v, lse


def random_mask(rng: random.Random, rows: int, keys: int, lead: tuple[int, ...] = ()) -> Tensor:
    """Unions of random intervals with sloping ends; some rows stay empty."""
    i, j = torch.arange(rows).unsqueeze(1), torch.arange(keys).unsqueeze(0)
    mask = torch.zeros(*lead, rows, keys, dtype=torch.bool)
    for _ in range(rng.randint(1, 3)):
        first, width, slope = rng.randrange(-rows, keys), rng.randint(1, keys), rng.choice([0, 0, 1])
        chosen = torch.rand(*lead, 1, 1) < 0.7 if lead else torch.tensor(True)
        mask = mask | (chosen & (j >= first + slope * i) & (j < first + width + slope * i))
    mask[..., torch.rand(rows) < 0.1, :] = False
    return mask


def check(
    seed: int,
    *,
    dtype: torch.dtype = torch.float64,
    shape: dict[str, int] | None = None,
    n_parts: int = 1,
    softcap: float | None = None,
    with_sink: bool = False,
    with_bias: bool = False,
    with_dlse: bool = False,
    per_head: bool = False,
) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    b, hq, n, m, dqk, dv = ({"b": 1, "hq": 2, "n": 37, "m": 53, "dqk": 8, "dv": 8} | (shape or {})).values()
    scale = dqk**-0.5
    q = torch.randn(b, hq, n, dqk).to(dtype)
    inputs, parts = [], []
    for at in range(n_parts):
        heads = 1 if at else rng.choice([h for h in (1, 2, hq) if hq % h == 0])
        k, v = torch.randn(b, heads, m + at, dqk).to(dtype), torch.randn(b, heads, m + at, dv).to(dtype)
        mask = random_mask(rng, n, m + at, (b, hq) if per_head else ())
        bias = torch.randn(hq, n, m + at).to(dtype) if with_bias else None
        inputs.append((k, v, mask, bias))
        parts.append(part_of(k, v, mask, bias, origin=11))
    sink = torch.randn(hq).to(dtype) if with_sink else None

    def leaf(x: Any) -> Any:
        return x.detach().double().requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x

    exact_q, exact_sink = leaf(q), leaf(sink)
    exact = [(leaf(k), leaf(v), mask, bias if bias is None else bias.double()) for k, v, mask, bias in inputs]
    want_out, want_lse = dense(exact_q, exact, scale, softcap, exact_sink)
    form = Logits(scale, softcap, q_origin=11)
    out, lse = sparse_forward(q, parts, form, sink=sink)
    assert out.dtype == dtype
    close(out, want_out, dtype)
    close(lse, want_lse, dtype)

    dout = torch.randn(b, hq, n, dv).to(dtype)
    dlse = torch.randn(b, hq, n, dtype=lse.dtype).masked_fill(lse == -math.inf, 0.0) if with_dlse else None
    total = (want_out * dout.double()).sum()
    if dlse is not None:
        total = total + (want_lse.masked_fill(want_lse == -math.inf, 0.0) * dlse.double()).sum()
    leaves = [exact_q, *(x for k, v, *_ in exact for x in (k, v)), *([exact_sink] if with_sink else [])]
    want = torch.autograd.grad(total, leaves)
    dq, pairs = sparse_backward(dout, dlse, q, parts, out, lse, form)
    got = [dq, *(x for pair in pairs for x in pair)]
    if sink is not None:
        got.append(sink_gradient(dout, dlse, out, lse, sink))
    for a, e in zip(got, want, strict=True):
        close(a, e, dtype)


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    size = want[want.isfinite()].abs().max().item() if want.isfinite().any() else 0.0
    torch.testing.assert_close(got.double(), want.detach(), rtol=0, atol=BOUND[dtype] * max(1.0, size))


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("seed", range(12))
def test_random_interval_sets(seed: int) -> None:
    rng = random.Random(seed)
    shape = {
        "b": rng.choice([1, 2]),
        "hq": rng.choice([2, 6]),
        "n": rng.choice([1, 15, 16, 17, 33, 61]),
        "m": rng.choice([1, 39, 40, 41, 97]),
        "dqk": rng.choice([5, 8, 16]),
        "dv": rng.choice([3, 8, 16]),
    }
    for again in range(3):
        check(
            100 * seed + again,
            shape=shape,
            n_parts=rng.choice([1, 1, 2]),
            with_sink=rng.random() < 0.4,
            with_bias=rng.random() < 0.4,
            per_head=rng.random() < 0.3,
        )


@pytest.mark.parametrize("seed", range(8))
def test_softcap_and_gradient_of_the_lse(seed: int) -> None:
    options = {"with_sink": bool(seed & 1), "with_bias": bool(seed & 2), "n_parts": 1 + (seed >> 2)}
    check(seed, softcap=1.5, **options)
    check(seed, with_dlse=True, **options)
    check(seed, softcap=0.7, with_dlse=True, shape={"hq": 3}, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("engine")
def test_narrow_types(dtype: torch.dtype) -> None:
    for seed in range(4):
        check(seed, dtype=dtype, with_sink=seed > 1, n_parts=1 + seed % 2)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize(("group", "heads"), [(1, 2), (3, 1), (3, 2)])
@pytest.mark.parametrize(("rows", "keys"), [(1, 90), (50, 20), (20, 50)])
def test_causal_with_queries_at_the_end_of_the_keys(rows: int, keys: int, group: int, heads: int) -> None:
    """More rows than keys leaves the first rows empty: output 0, lse -inf, gradients 0."""
    torch.manual_seed(rows + keys + group)
    q = torch.randn(2, heads * group, rows, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, heads, keys, 8, dtype=torch.float64)
    mask = torch.arange(keys) <= torch.arange(keys - rows, keys).unsqueeze(1)
    part = part_of(k, v, mask, origin=keys - rows)
    out, lse = sparse_forward(q, [part], Logits(0.3, q_origin=keys - rows))
    want_out, want_lse = dense(q, [(k, v, mask, None)], 0.3, None, None)
    close(out, want_out, q.dtype)
    close(lse, want_lse, q.dtype)
    dq, [(dk, dv)] = sparse_backward(torch.ones_like(out), None, q, [part], out, lse, Logits(0.3, q_origin=keys - rows))
    empty = max(0, rows - keys)
    assert out[:, :, :empty].eq(0).all()
    assert lse[:, :, :empty].eq(-math.inf).all()
    assert dq[:, :, :empty].eq(0).all()
    assert all(x.isfinite().all() for x in (dq, dk, dv))


def test_an_empty_row_has_the_lse_of_the_sink() -> None:
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    sink = torch.tensor([0.25, -math.inf])
    out, lse = sparse_forward(q, [Part(k, v, lambda first, end: [], lambda i, j: j < 0)], Logits(1.0), sink=sink)
    assert out.eq(0).all()
    assert lse[0, 0].eq(0.25).all()
    assert lse[0, 1].eq(-math.inf).all()


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_hidden_poison_reaches_nobody(poison: float) -> None:
    """A poisoned key shares tiles with clean ones; only the rows that see it may change."""
    torch.manual_seed(0)
    n, bad = 48, 21
    q, k, v, dout = (torch.randn(1, 2, n, 8, dtype=torch.float64) for _ in range(4))
    i, j = torch.arange(n).unsqueeze(1), torch.arange(n).unsqueeze(0)
    mask = (j <= i) & (i - j < 12)

    def run(k: Tensor, v: Tensor) -> list[Tensor]:
        part = part_of(k, v, mask)
        out, lse = sparse_forward(q, [part], Logits(0.3))
        dq, [(dk, dv)] = sparse_backward(dout, None, q, [part], out, lse, Logits(0.3))
        return [out, lse, dq, dk, dv]

    clean = run(k, v)
    k_bad, v_bad = k.clone(), v.clone()
    k_bad[:, :, bad], v_bad[:, :, bad] = poison, poison
    rows = ~mask[:, bad]
    keys = ~mask[~rows].any(0)  # keys that no poisoned row sees
    for got, want, kept in zip(run(k_bad, v_bad), clean, [rows, rows, rows, keys, keys], strict=True):
        torch.testing.assert_close(got[:, :, kept], want[:, :, kept], rtol=0, atol=1e-12)

    mask = mask & (j != bad)
    clean = run(k, v)
    for got, want in zip(run(k_bad, v_bad), clean, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_only_the_visited_ranges_are_read() -> None:
    """One row over many keys: what lies outside its ranges may hold anything, and costs nothing."""
    q, k, v = (
        torch.randn(1, 2, 1, 8),
        torch.full((1, 2, 100_000, 8), math.nan),
        torch.full((1, 2, 100_000, 8), math.nan),
    )
    k[:, :, :4], v[:, :, :4] = 0.0, 1.0
    k[:, :, 99_990:], v[:, :, 99_990:] = 0.0, 8.0
    calls: list[tuple[int, int]] = []

    def visits(first: int, end: int) -> Ranges:
        calls.append((first, end))
        return [(0, 4, True), (99_990, 100_000, True)]

    out, lse = sparse_forward(q, [Part(k, v, visits, lambda i, j: j >= 0)], Logits(1.0, q_origin=99_999))
    assert calls == [(0, 1)]
    torch.testing.assert_close(out, torch.full_like(out, 6.0))
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(14)))


@pytest.mark.usefixtures("engine")
def test_repeats_are_bitwise_equal() -> None:
    torch.manual_seed(3)
    q, k, v, dout = (torch.randn(1, 4, 130, 16) for _ in range(4))
    i, j = torch.arange(130).unsqueeze(1), torch.arange(130).unsqueeze(0)
    part = part_of(k, v, (j <= i) & ((i - j < 33) | (j < 4)))
    first: list[Tensor] | None = None
    for _ in range(4):
        out, lse = sparse_forward(q, [part], Logits(0.25))
        dq, [(dk, dv)] = sparse_backward(dout, None, q, [part], out, lse, Logits(0.25))
        found = [out, lse, dq, dk, dv]
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))


def test_the_flash_engine_does_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tile may fall back to the slower engine without need, empty rows included."""
    for name in ("plain_forward", "plain_backward"):
        monkeypatch.setattr(cpu, name, lambda *_: pytest.fail("the slow engine ran"))
    for seed in range(4):
        check(seed, n_parts=2, with_sink=True, with_bias=True, shape={"hq": 6, "dv": 5})
