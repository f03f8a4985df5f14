"""The formulas of docs/language.md say which keys a set holds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import spdsl

TOKENS = 40


def visible(body: str, **arguments: torch.Tensor) -> torch.Tensor:
    """Which keys each query sees [N, M]: with equal logits and v the identity, the output is the row of weights."""
    zeros = torch.zeros(1, 1, TOKENS, 16)
    identity = torch.eye(TOKENS).view(1, 1, TOKENS, TOKENS)
    module = spdsl.load(f"pattern formula {{ {body} }}")
    rows = module.reference(zeros, zeros, identity, **arguments)[0, 0]
    assert torch.equal(rows > 0, module.attention(zeros, zeros, identity, **arguments)[0, 0] > 0)
    return rows > 0


Formula = Callable[[int, int], bool]
FORMULAS: dict[str, Formula] = {
    "all": lambda q, k: True,
    "sink(4)": lambda q, k: k < 4,
    "sliding(5)": lambda q, k: 0 <= q - k < 5,
    "sliding(5, ahead = 3)": lambda q, k: -3 <= q - k < 5,
    "first(2, unit = 8)": lambda q, k: k < 16,
    "last(2, unit = 8, ahead = 1)": lambda q, k: 8 * (q // 8 - 1) <= k < 8 * (q // 8 + 2),
    "last(2, unit = 4, rows = 8)": lambda q, k: (q // 8 * 8 + 7) // 4 - 1 <= k // 4 <= (q // 8 * 8 + 7) // 4,
    "dilated(3, 4)": lambda q, k: 0 <= q - k < 12 and (q - k) % 4 == 0,
    "strided(4)": lambda q, k: (q - k) % 4 == 0,
    "fixed(8, 2)": lambda q, k: k // 8 == q // 8 or k % 8 >= 6,
    "open(8)": lambda q, k: 8 * ((q + 1) // 8) <= k <= q,
    "where(k < 6 | abs(q - k) < 4 & k % 2 == 0)": lambda q, k: k < 6 or (abs(q - k) < 4 and k % 2 == 0),
    "sliding(9) - sliding(3)": lambda q, k: 3 <= q - k < 9,
    "~sliding(5)": lambda q, k: not 0 <= q - k < 5,
    "sliding(9) & where(k >= length - 20)": lambda q, k: 0 <= q - k < 9 and k >= TOKENS - 20,
}


def mask(formula: Formula) -> torch.Tensor:
    return torch.tensor([[formula(q, k) for k in range(TOKENS)] for q in range(TOKENS)])


@pytest.mark.parametrize("text", FORMULAS)
def test_formula(text: str) -> None:
    assert torch.equal(visible(f"return attend({text})"), mask(FORMULAS[text]))


def test_causal_hides_later_keys() -> None:
    assert torch.equal(visible("causal return attend(fixed(8, 2))"), mask(FORMULAS["fixed(8, 2)"]).tril())


def test_cover_holds_whole_tiles() -> None:
    tiles = visible("return attend(cover(sliding(6), rows = 8, unit = 8))").view(5, 8, 5, 8)
    covered = visible("return attend(sliding(6))").view(5, 8, 5, 8).any(3).any(1)
    assert torch.equal(tiles.any(3).any(1), tiles.all(3).all(1))
    assert bool((covered <= tiles.any(3).any(1)).all())


def test_random_draws_of_the_visible_units() -> None:
    drawn = visible("causal return attend(random(2, unit = 4, rows = 8, seed = 3))").view(5, 8, 10, 4)
    units = drawn[:, 7].any(-1)  # the last query of a tile sees every unit that was drawn
    assert units.sum(-1).tolist() == [2] * 5
    whole = visible("causal return attend(random(99, unit = 4, rows = 8))")
    assert torch.equal(whole, torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril())


def test_given_counts_tiles_from_the_first_query_and_drops_what_is_no_unit() -> None:
    tiles = torch.tensor([[[[0, 0, -1, 99], [3, 1, 1, -1], [-1, -1, -1, -1]]]])
    seen = visible("listed = given(unit = 8, rows = 16) return attend(listed)", listed=tiles)
    wanted = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    wanted[:16, :8] = wanted[16:32, 8:16] = wanted[16:32, 24:32] = True
    assert torch.equal(seen, wanted)
