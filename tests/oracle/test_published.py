"""Published patterns, from their files, against their definitions written out query by query."""

from __future__ import annotations

from fractions import Fraction
from math import inf

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

from spdsl.diagnostics import Report, Source
from spdsl.ir.pattern import Pattern
from spdsl.oracle.dense import attention, choices
from spdsl.passes.lower import lower
from spdsl.resources import folder
from spdsl.syntax.parse import parse
from tests.oracle import built

HEADS, KV_HEADS, DIM, ROWS = 4, 2, 4, 77


def published(name: str, text: str = "", **params: int) -> Pattern:
    source = Source(text or (folder("patterns") / f"{name}.spat").read_text())
    report = Report(source)
    found = lower(parse(source, report).patterns[0], report, {key: Fraction(value) for key, value in params.items()})
    report.check()
    assert found is not None
    return found


def attended(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """One query [dim] over entries [M, dim]."""
    logits = k @ q / q.shape[0] ** 0.5
    return torch.softmax(logits, 0) @ v, torch.logsumexp(logits, 0)


def tokens_of(units: set[int], unit: int, q: int) -> list[int]:
    return [token for one in sorted(units) for token in range(unit * one, min(unit * one + unit, q + 1))]


def best(score: dict[int, float], forced: set[int], count: int) -> set[int]:
    rest = sorted((unit for unit in score if unit not in forced), key=lambda unit: (-score[unit], unit))
    return forced | set(rest[: count - len(forced)])


def test_nsa() -> None:
    """(8, 4, 16) has the proportions of (32, 16, 64), so its entries weigh 1, 2, 2, 2, 1 too."""
    width, stride, unit, count, window = 8, 4, 16, 4, 10
    found = published("nsa", width=width, stride=stride, block=unit, count=count, window=window)
    x = built.numbers(found, ROWS, heads=HEADS, kv_heads=KV_HEADS, dim=DIM)
    out, lse = attention(found, x)
    lists = choices(found, x)["chosen"]

    def entry(side: str, head: int, i: int) -> Tensor:
        position, up, down = (x[f"entries_{side}_{role}"][head] for role in ("position", "up", "down"))
        cell = x[f"{side}_rough"][0, head, stride * i : stride * i + width] + position
        return gelu(cell.flatten() @ up.flatten(0, 1)) @ down

    made = {
        (side, head): torch.stack([entry(side, head, i) for i in range((ROWS - width) // stride + 1)])
        for side in "kv"
        for head in range(KV_HEADS)
    }
    for q in [*range(12), 31, 32, 50, 63, 76]:
        closed = len([i for i in range(ROWS) if stride * i + width - 1 <= q])
        for head in range(KV_HEADS):
            k, v = made["k", head][:closed], made["v", head][:closed]
            group = [2 * head, 2 * head + 1]
            p = torch.stack([torch.softmax(k @ x["q"][0, h, q] / DIM**0.5, 0) for h in group]).sum(0)
            weights = dict(enumerate((1, 2, 2, 2, 1), -1))
            score = {
                u: sum(p[4 * u + i].item() * weights[i] for i in weights if 0 <= 4 * u + i < closed)
                for u in range(q // unit + 1)
                if 4 * u - 1 < closed
            }
            units = best(score, {0, q // unit, max(0, q // unit - 1)}, count)
            assert set(lists[0, head, q].tolist()) - {-1} == units
            picked, recent = tokens_of(units, unit, q), list(range(max(0, q - window + 1), q + 1))
            for h in group:
                ask = x["q"][0, h, q]
                parts = [
                    attended(ask, k, v) if closed else (torch.zeros(DIM).double(), torch.tensor(-inf).double()),
                    attended(ask, x["k_picked"][0, head, picked], x["v_picked"][0, head, picked]),
                    attended(ask, x["k_recent"][0, head, recent], x["v_recent"][0, head, recent]),
                ]
                gates = x["gates"][0, h, q]
                torch.testing.assert_close(
                    out[0, h, q], sum(g * part for g, (part, _) in zip(gates, parts, strict=True))
                )
                torch.testing.assert_close(lse[0, h, q], torch.stack([one for _, one in parts]))


def test_moba() -> None:
    found = published("moba", block=16, count=2)
    x = built.numbers(found, ROWS, heads=HEADS, kv_heads=KV_HEADS, dim=DIM)
    out, lse = attention(found, x)
    for q in (0, 15, 16, 40, 63, 64, 76):
        for h in range(HEADS):
            k, v, ask = x["k"][0, h // 2], x["v"][0, h // 2], x["q"][0, h, q]
            score = {u: (k[16 * u : 16 * u + 16].mean(0) @ ask).item() for u in range(q // 16)}
            tokens = tokens_of(best(score, {q // 16}, 2), 16, q)
            wanted = attended(ask, k[tokens], v[tokens])
            torch.testing.assert_close(out[0, h, q], wanted[0])
            torch.testing.assert_close(lse[0, h, q], wanted[1])


def test_infllm_v2() -> None:
    """Blocks of 16 for entries (32, 16): of them j - 1 and j overlap block j."""
    text = (folder("patterns") / "infllm_v2.spat").read_text().replace("if length < 8192", "if length < 20")
    found = published("", text, block=16, count=2, local=2)
    x = built.numbers(found, ROWS, heads=HEADS, kv_heads=KV_HEADS, dim=DIM)
    out, _ = attention(found, x)
    means = x["k"][0].unfold(1, 32, 16).mean(-1)
    for q in (0, 31, 47, 48, 60, 76):
        closed = max(0, (q + 1 - 32) // 16 + 1)
        near = {q // 16, max(0, q // 16 - 1)}
        for head in range(KV_HEADS):
            asks = x["q"][0, 2 * head : 2 * head + 2, q]
            p = torch.softmax(asks @ means[head, :closed].T / DIM**0.5, -1).sum(0)
            score = {
                u: max(p[i].item() for i in (u - 1, u) if 0 <= i < closed)
                for u in range(q // 16 + 1)
                if u not in near and (u - 1 in range(closed) or u in range(closed))
            }
            tokens = tokens_of(best(score, {0} - near, 2) | near, 16, q)
            for h, ask in zip((2 * head, 2 * head + 1), asks, strict=True):
                wanted, _ = attended(ask, x["k"][0, head, tokens], x["v"][0, head, tokens])
                torch.testing.assert_close(out[0, h, q], wanted)


@pytest.mark.parametrize("count", [5, 9])
def test_nsa_with_room_for_all_blocks_and_tokens_is_dense(count: int) -> None:
    found = published("nsa", width=8, stride=4, block=16, count=count, window=ROWS)
    x = built.numbers(found, ROWS, heads=HEADS, kv_heads=KV_HEADS, dim=DIM)
    x["gates"] = x["gates"] * torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    out, lse = attention(found, x)
    dense = published("", "pattern p { causal return attend(all) }")
    parts = [attention(dense, {"q": x["q"], "k": x[f"k_{one}"], "v": x[f"v_{one}"]}) for one in ("picked", "recent")]
    torch.testing.assert_close(out, sum(x["gates"][..., i + 1, None] * parts[i][0] for i in (0, 1)))
    torch.testing.assert_close(lse[..., 1:], torch.stack([one for _, one in parts], -1))
