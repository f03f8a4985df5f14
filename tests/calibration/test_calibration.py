"""Margins against the rule itself, tile by tile; the line against curves whose law is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from spdsl.calibration import Curve, Rule, calibrated, margins
from spdsl.calibration.fit import params


def left_out(rule: Rule, q: Tensor, k: Tensor, level: float) -> tuple[int, int]:
    """Tiles that the rule leaves out, of those visible: in order of keys, the maximum over the kept tiles alone."""
    dropped = visible = 0
    group, origin = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    scale = 1 / math.sqrt(q.shape[3])
    voters = (
        [range(h * group, (h + 1) * group) for h in range(k.shape[1])]
        if rule.by_group
        else [[h] for h in range(q.shape[1])]
    )
    for batch in range(q.shape[0]):
        for heads in voters:
            for first in range(0, k.shape[2], rule.rows):
                rows = range(max(first, origin), min(first + rule.rows, k.shape[2]))
                top: dict[Any, float] = {}
                for start in range(0, k.shape[2], rule.unit):
                    if rule.restart and start % rule.restart == 0:
                        top = {}
                    own = {}
                    for h in heads:
                        for p in rows:
                            keys = [
                                j for j in range(start, min(start + rule.unit, k.shape[2])) if j <= p or not rule.causal
                            ]
                            if keys:
                                logits = (
                                    k[batch, h // group, keys].double() @ q[batch, h, p - origin].double()
                                ) * scale
                                own[h, p] = logits.max().item()
                    if not own:
                        continue
                    visible += 1
                    if all(x < top.get(at, -math.inf) + math.log(level) for at, x in own.items()):
                        dropped += 1
                        continue
                    top |= {at: max(x, top.get(at, -math.inf)) for at, x in own.items()}
    return dropped, visible


def vectors(heads: int, kv_heads: int, queries: int, keys: int, order: str = "random") -> tuple[Tensor, Tensor]:
    torch.manual_seed(len(order))
    q, k = 3 * torch.randn(1, heads, queries, 8), torch.randn(1, kv_heads, keys, 8)
    if order != "random":
        q = q.abs()
        k = torch.arange(keys).view(1, 1, -1, 1) / 10 + 0.1 * k.abs()
        k = k.flip(2) if order == "falling" else k
    return q, k


RULES = [
    Rule(rows=16, unit=16), Rule(rows=1, unit=16), Rule(rows=16, unit=32), Rule(rows=1, unit=16, restart=32),
    Rule(rows=32, unit=16), Rule(rows=16, unit=16, by_group=True), Rule(rows=16, unit=16, causal=False),
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("order", ["random", "rising", "falling"])
def test_margins_are_the_rule(rule: Rule, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr(sys.modules["spdsl.calibration.margins"], "_PAIRS", 300)  # a few rows at once
    q, k = vectors(4, 2, 40 if rule.rows > 1 else 9, 72, order)
    q = q if rule.causal else vectors(4, 2, 72, 72, order)[0]
    found = margins(rule, q, k)
    for level in (1.0, 0.3, 0.01):
        dropped, visible = left_out(rule, q, k, level)
        assert len(found) == visible
        assert int((found < math.log(level)).sum()) == dropped
    if order == "falling":
        assert (found < 0).any()


def test_a_run_begins_anew() -> None:
    """Falling keys: only the first tile of each run is kept at the level 1."""
    q, k = vectors(1, 1, 8, 128, "falling")
    assert int((margins(Rule(rows=1, unit=16), q, k) >= 0).sum()) == 8
    assert int((margins(Rule(rows=1, unit=16, restart=32), q, k) >= 0).sum()) == 8 * 4


@pytest.mark.parametrize(
    "q, k, message",
    [
        (torch.ones(2, 3, 4), torch.ones(1, 1, 3, 4), "q: expected"),
        (torch.ones(1, 3, 4, 8), torch.ones(1, 2, 4, 8), "k: expected batch, dim and heads"),
        (torch.ones(1, 2, 5, 8), torch.ones(1, 2, 4, 8), "5 queries and 4 keys"),
        (torch.ones(1, 2, 4, 8) * math.nan, torch.ones(1, 2, 4, 8), "q: expected finite numbers"),
    ],
)
def test_what_does_not_fit(q: Tensor, k: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        margins(Rule(), q, k)


LOG_A, B = 2.0, 6.0


def curve(length: int, tiles: int = 4000, log_a: float = LOG_A, b: float = B, kept: float = 0.02) -> Curve:
    """At the level x a share s of the tiles is left out with log(x length) = log a + b s; the rest never is."""
    shares = [(i + 0.5) / tiles for i in range(tiles)]
    return Curve.of(length, [log_a + b * s - math.log(length) if s < 1 - kept else math.inf for s in shares])


LENGTHS = (4096, 8192, 16384, 65536)


def test_the_law_is_found() -> None:
    curves = [curve(length) for length in LENGTHS]
    found = calibrated(curves, (0.5, 0.7, 0.9))
    assert found.log_a == pytest.approx(LOG_A, abs=0.01)
    assert found.b == pytest.approx(B, abs=0.02)
    assert found.error < 0.002
    for wanted in (0.5, 0.7, 0.9):
        assert found.scale(wanted) == pytest.approx(math.exp(LOG_A + B * wanted), rel=0.01)
        assert found.reached(curves, wanted) == pytest.approx(dict.fromkeys(LENGTHS, wanted), abs=0.002)


def test_a_fixed_level_drifts() -> None:
    """What the division by the length is for."""
    level = math.exp(LOG_A + B * 0.5) / 8192
    shares = [curve(length).sparsity(level) for length in LENGTHS]
    assert shares == sorted(shares)
    assert shares[-1] - shares[0] > 0.4


def test_what_the_data_cannot_reach() -> None:
    """At 4,096 tokens 6 s = log 4096 - 2 + ... ends where the level is 1; and six tenths are never left out."""
    curves = [curve(4096, kept=0.4), curve(8192)]
    with pytest.raises(ValueError, match=r"0\.7 cannot be reached: at 4,096 tokens no more than 0\.600"):
        calibrated(curves, (0.5, 0.7))
    assert calibrated(curves, (0.5,)).b == pytest.approx(B, abs=0.05)


@pytest.mark.parametrize("wanted", [0.0, 1.0, -0.5, math.nan])
def test_wanted_is_a_share(wanted: float) -> None:
    with pytest.raises(ValueError, match="sparsity: expected numbers between 0 and 1"):
        calibrated([curve(4096)], (wanted,))


def test_no_tiles_make_no_line() -> None:
    with pytest.raises(ValueError, match="no tiles"):
        calibrated([], (0.5,))
    with pytest.raises(ValueError, match="too few tiles"):
        calibrated([Curve.of(16, [-1.0])], (0.5,))


def test_levels_above_one_count_as_one() -> None:
    found = Curve.of(16, [-2.0, -1.0, 0.5, math.inf])
    assert [found.sparsity(level) for level in (0.0, -1.0, math.exp(-1.5), 1.0, 5.0)] == [0, 0, 0.25, 0.5, 0.5]


def test_params() -> None:
    found = calibrated([curve(length) for length in LENGTHS], (0.7,))
    assert params(found, {0.7: "prefill_scale"})["prefill_scale"] == pytest.approx(found.scale(0.7), rel=1e-5)


def generated(length: int, heads: int = 2) -> tuple[Tensor, Tensor]:
    """A key every 64 tokens is a little longer than the others, and each query likes near keys."""
    torch.manual_seed(length)
    q, k = torch.randn(1, heads, length, 16), torch.randn(1, 1, length, 16)
    k[:, :, ::64] *= 2
    return 2 * q, k


def test_on_generated_vectors_sparsity_holds_between_lengths() -> None:
    """a / length at lengths within the fit: what is reached is what was asked for, within five points."""
    curves = [Curve.of(n, margins(Rule(rows=1, unit=16), *generated(n)).tolist()) for n in (256, 512, 1024)]
    wanted = 0.5
    found = calibrated(curves, (wanted,))
    assert found.reached(curves, wanted) == pytest.approx(dict.fromkeys((256, 512, 1024), wanted), abs=0.05)
