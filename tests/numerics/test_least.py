"""`least` of a threshold: scores that leave none, too few, enough and too many units above the level, by hand."""

from __future__ import annotations

from math import inf, isfinite, nan
from types import ModuleType

import pytest
import torch

from tests.numerics.cases import Inputs, Shape, inputs_of
from tests.numerics.conftest import Engine
from tests.numerics.patterns import pattern_of
from tests.numerics.selected import expect_lists

Case = tuple[list[float], list[int]]  # a score for each unit of 16 tokens; the units that are chosen by level 0


def above(bounds: str) -> str:
    return (
        "causal index = stream(value = none) units = compress(16, of = index) chosen = threshold(0, "
        f"score = dot(units), share = max(group), {bounds}) return attend(chosen)"
    )


FREE: list[Case] = [
    ([-1, -2, -3, -4, -5], [0, 1]),  # none
    ([-3, -2, 3, -4, -5], [1, 2]),  # fewer
    ([-1, 2, -3, 1, -5], [1, 3]),  # exactly as many
    ([1, -1, 2, -2, 3], [0, 2, 4]),  # more
    ([1, 2, -1, 3, 4], [1, 3, 4]),  # more than `most`
    ([0, -1, 0, -1, 0], [0, 2, 4]),  # at the level
    ([-2, -1, -1, -1, 5], [1, 4]),  # ties below the level
    ([-1, -1, -1, -1, -1], [0, 1]),
    ([7, 7, 7, 7, 7], [0, 1, 2]),  # ties above it
    ([nan, -2, nan, -1, nan], [1, 3]),
    ([-inf, nan, -2, -inf, -inf], [2]),  # fewer have a score
    ([nan, nan, nan, nan, nan], []),
]
FORCED: list[Case] = [
    ([-9, -1, -2, -3, -4], [0, 1]),  # the forced unit counts
    ([-9, -1, -1, 1, -4], [0, 3]),
    ([-9, 1, -1, 1, -4], [0, 1, 3]),
    ([9, -1, -1, -2, -1], [0, 1]),
    ([nan, -3, -2, -1, -4], [0, 3]),
    ([nan, nan, nan, nan, nan], [0]),
]
WITHIN: list[Case] = [
    ([9, 9, -3, -2, -1], [3, 4]),
    ([-1, -1, -3, -2, -2], [3, 4]),
    ([9, 9, 3, 2, 1], [2, 3, 4]),
    ([9, -1, nan, -2, nan], [3]),
]
BODIES: dict[str, tuple[str, list[Case]]] = {
    "free": (above("least = 2, most = 3"), FREE),
    "forced": (above("least = 2, most = 3, force = first(1)"), FORCED),
    "within": (above("least = 2, most = 3, within = ~first(2)"), WITHIN),
    "no most": (above("least = 2"), [*FREE[:3], ([1, 2, -1, 3, 4], [0, 1, 3, 4]), *FREE[-3:]]),
}


def scored(body: str, groups: list[list[list[float]]], heads: int) -> Inputs:
    """A sequence for each group: row i scores the closed units by the i-th of the group. A last unit stays open."""
    count = len(groups[0][0])
    inputs = inputs_of(pattern_of(body), Shape(max(map(len, groups)), 16 * count + 15, len(groups), heads))
    inputs["q"], inputs["k_index"] = torch.zeros_like(inputs["q"]), torch.zeros_like(inputs["k_index"])
    for b, group in enumerate(groups):
        for row in range(inputs["q"].shape[2]):
            # A NaN among the keys is one for every row. Of a group of heads one decides, the others agree in the sign.
            inputs["q"][b, :, row, min(row, len(group) - 1)] = 0.5
            inputs["q"][b, 0, row, min(row, len(group) - 1)] = 1.0
        values = torch.tensor(group, dtype=torch.float64).repeat_interleave(16, 1)
        inputs["k_index"][b, 0, : 16 * count, : len(group)] = values.T
    return inputs


def check(body: str, module: ModuleType, groups: list[list[Case]], heads: int) -> None:
    inputs = scored(body, [[scores for scores, _ in group] for group in groups], heads)
    found = module.choices(**inputs)
    for lists, group in zip(found["chosen"], groups, strict=True):
        for row, (_, wanted) in enumerate(group):
            assert [unit for unit in lists[0, row].tolist() if unit >= 0] == wanted
    expect_lists(found, pattern_of(body), inputs)


@pytest.mark.parametrize("heads", [1, 2, 16])
@pytest.mark.parametrize("name", BODIES)
def test_scores_around_the_level(engine: Engine, name: str, heads: int) -> None:
    body, cases = BODIES[name]
    if engine.name == "interpreted" and name != "free" and heads != 2:
        pytest.skip("the same kernel in fewer groups")
    rows = [case for case in cases if all(map(isfinite, case[0]))]
    others = [] if engine.name == "interpreted" and heads != 2 else [[case] for case in cases if case not in rows]
    check(body, engine(body), [rows, *others], heads)


@pytest.mark.parametrize("name", ["free", "forced", "within"])
def test_splits_of_a_step_share_one_least(engine: Engine, name: str) -> None:
    """One query of 70 units: its programs rank a share each."""
    body, cases = BODIES[name]
    if engine.name == "interpreted" and name == "within":
        pytest.skip("the same kernel in fewer patterns")
    chosen = [*cases[:2], cases[-2]] if engine.name == "interpreted" else cases
    check(body, engine(body), [[spread(case)] for case in chosen], 2)


def spread(case: Case) -> Case:
    """The five scores far apart, nothing between them."""
    scores, chosen = case
    places = [0, 1, 25, 47, 69]
    values = [-inf] * 70
    for place, score in zip(places, scores, strict=True):
        values[place] = score
    return values, [places[unit] for unit in chosen]


def test_fewer_units_than_least_are_all_taken(engine: Engine) -> None:
    """A query at 16 n + 15 is the first that sees n + 1 closed units."""
    body, _ = BODIES["free"]
    inputs = inputs_of(pattern_of(body), Shape(50, 50))
    inputs["q"], inputs["k_index"] = torch.ones_like(inputs["q"]), -torch.ones_like(inputs["k_index"])
    lists = engine(body).choices(**inputs)["chosen"][0, 0]
    for q in (0, 14, 15, 30, 31, 46, 47, 49):
        assert lists[q, lists[q] >= 0].tolist() == list(range(min(2, (q + 1) // 16)))
