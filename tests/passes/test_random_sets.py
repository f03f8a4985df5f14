"""Random sets: every symbolic analysis against the mask tested pair by pair."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from spdsl.ir.plan import Plan, Sweep
from spdsl.ir.symbols import Boolean
from spdsl.ir.visit import Range, Ranges
from spdsl.passes.disjuncts import TooComplex, disjuncts
from spdsl.passes.tidy import tidy
from tests.passes.analyses import Case, Tiles, planned
from tests.passes.random_sets import Drawn, Maker, Setting, setting

CHUNKS, PER_CHUNK = 40, 50
FULL = [pytest.param(chunk, marks=() if chunk < 6 else pytest.mark.full) for chunk in range(CHUNKS)]


def drawn(seed: int) -> tuple[Drawn, Setting]:
    """Words alone, pairs, and threes or fours of sets."""
    return Maker(seed).set((1, 0, 1, 2)[seed % 4]), setting(seed)


@pytest.mark.parametrize("chunk", FULL)
def test_analyses_of_random_sets(chunk: int) -> None:
    checked = 0
    for seed in range(chunk * PER_CHUNK, (chunk + 1) * PER_CHUNK):
        one, s = drawn(seed)
        try:
            checked += check_all(one, s, seed)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {s}: {one.text}: {error}") from error
    assert checked > PER_CHUNK // 2


def check_all(one: Drawn, s: Setting, seed: int) -> bool:
    plan = planned(one.text, s.causal)
    if plan is None:
        assert not one.exact or not one.seen(s).any() or one.text.count("(") > 8, "refused as empty"
        return False
    case, rng = Case(plan.pattern, s), random.Random(seed)
    sweep = plan.softmaxes[0].sweeps[0]
    mask = check_meaning(one, s, case, sweep.test)
    rows = Tiles(s.origin, s.rows, rng.choice([1, 2, 3, 4, 8, 16]))
    keys = Tiles(0, s.keys, rng.choice([1, 2, 3, 4, 8, 16]))
    if isinstance(sweep.visit, Ranges):
        check_key_ranges(case, sweep.visit, rows, mask)
        check_row_ranges(case, sweep.visit, keys, mask)
    check_tiles(case, plan, rows, keys, mask)
    check_decode(case, sweep, mask)
    return True


def check_meaning(one: Drawn, s: Setting, case: Case, test: Boolean) -> Tensor:
    mask = case.mask(test)
    assert torch.equal(mask, one.seen(s)) or not one.exact, "the lowered test"
    try:
        parts = [case.mask(conjunct.test()) for conjunct in disjuncts(test)]
    except TooComplex:
        return mask
    assert torch.equal(torch.stack(parts).any(0), mask), "disjuncts"
    assert torch.equal(case.mask(tidy(test)), mask), "tidy"
    return mask


def check_key_ranges(case: Case, visit: Ranges, rows: Tiles, mask: Tensor) -> None:
    around = case.on(q_first=rows.starts.view(1, -1, 1), q_last=rows.ends.view(1, -1, 1))
    visited, full = united(case, visit.keys, around, case.s.k, len(rows.starts))
    assert not (rows.any(mask, 1) & ~visited).any(), "a visible key lies in no range"
    assert not (full & ~rows.all(mask, 1)).any(), "a hidden pair lies in a full range"


def check_row_ranges(case: Case, visit: Ranges, keys: Tiles, mask: Tensor) -> None:
    s = case.s
    around = case.on(
        k_first=keys.starts.view(1, -1, 1), k_last=keys.ends.view(1, -1, 1),
        q_begin=torch.tensor(s.origin).view(1, 1, 1), q_end=torch.tensor(s.keys).view(1, 1, 1),
    )  # fmt: skip
    across = mask.transpose(1, 2)
    visited, full = united(case, visit.rows, around, s.q.transpose(1, 2), len(keys.starts))
    assert not (keys.any(across, 1) & ~visited).any(), "a row that sees the tile lies in no range"
    assert not (full & ~keys.all(across, 1)).any(), "a hidden pair lies in a full range of rows"


def united(case: Case, ranges: tuple[Range, ...], around, positions: Tensor, tiles: int) -> tuple[Tensor, Tensor]:
    """Visited and full positions of all ranges [H, tiles, positions]; their starts must not fall."""
    spans = [case.spans(one, around, positions, tiles) for one in ranges]
    for (_, _, before), (_, _, after) in pairwise(spans):
        assert (before <= after).all(), "ranges out of order"
    return torch.stack([found[0] for found in spans]).any(0), torch.stack([found[1] for found in spans]).any(0)


def check_tiles(case: Case, plan: Plan, rows: Tiles, keys: Tiles, mask: Tensor) -> None:
    from spdsl.ir import interval

    test = plan.softmaxes[0].softmax.terms[0].test
    may, must = case.settled(interval.may(test), rows, keys), case.settled(interval.must(test), rows, keys)
    assert not (keys.any(rows.any(mask, 1), 2) & ~may).any(), "a tile with a visible pair was called empty"
    assert not (must & ~keys.all(rows.all(mask, 1), 2)).any(), "a tile with a hidden pair was called full"


def check_decode(case: Case, sweep: Sweep, mask: Tensor) -> None:
    """One query at a time: its ranges hold every key that any head sees, in order."""
    rows = Tiles(case.s.origin, case.s.rows, 1)
    visited, _ = united(case, sweep.decode, case.on(q=case.s.q), case.s.k, len(rows.starts))
    assert not (mask & ~visited).any(), "a visible key lies in no range of decode"
    assert all(not {"h"} & {symbol.name for symbol in one.first.free_symbols} for one in sweep.decode)
