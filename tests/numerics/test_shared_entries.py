"""Entries that several units overlap: multiplied once, and what they add to units further on is kept for those."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from spdsl.ir.pattern import Stream
from spdsl.ir.plan import ChoicePlan
from spdsl.passes.selection import selection
from spdsl.runtime.entries.entries import Cells, entry_count
from tests.library import broken, launches
from tests.numerics.cases import Shape, inputs_of
from tests.numerics.conftest import Engine
from tests.numerics.patterns import pattern_of, printed
from tests.numerics.selected import by_rank, expect_lists, lists_of

pytestmark = pytest.mark.interpret

HEADS, LISTS, DIM = 6, 2, 16
BY = ("sum", "max", "mean")


def body_of(seed: int) -> str:
    """Cells of any width and place, units of a few cells, every way to reduce."""
    draw = random.Random(seed)
    unit, stride = draw.choice([(16, 16), (16, 8), (16, 4), (32, 8), (48, 12)])
    width = draw.randint(stride, 4 * stride)
    partial = draw.choice([False, True])
    cells = f"{width}, {stride}, before = {draw.randrange(width)}" + ", partial = keep" * partial
    rule = (
        f"top_k(4, score = {draw.choice(['rank', 'softmax(rank)'])}, share = {draw.choice(BY)}(group), "
        f"unit = {draw.choice(BY)}({unit}){draw.choice(['', ', force = last(1)'])})"
    )
    return by_rank(rule, draw.choice(["", "causal"]), cells) + " if train" * partial


BODIES = [body_of(seed) for seed in range(7)]
WIDE = by_rank("top_k(4, score = softmax(rank), unit = 16, share = group)", compress="64, 16")  # each of four units
NEAR = by_rank("top_k(4, score = softmax(rank), unit = 16, share = group, force = last(1))", compress="12, 4")
EARLY = by_rank("top_k(4, score = rank, unit = max(16), share = max(group))", compress="24, 8, before = 20")
CUT = by_rank("top_k(4, score = softmax(rank), unit = 16, share = group)", "", "24, 8, partial = keep") + " if train"


def plan_of(body: str) -> ChoicePlan:
    pattern = pattern_of(body)
    (choice,) = lists_of(pattern)
    return selection(pattern, choice)


def cells_of(body: str) -> Cells:
    (entries,) = (found for found in pattern_of(body).inputs if isinstance(found, Stream) and found.compress)
    return Cells(entries.grid.width, entries.grid.stride, entries.grid.before, entries.grid.partial)


class Call(NamedTuple):
    """Queries of each sequence, and its units, of which the last is short; packed if there are several."""

    rows: tuple[int, ...]
    units: tuple[int, ...]
    batch: int = 1

    def lists(self, body: str, module: ModuleType, by_kernel: bool) -> Tensor:
        """What the kernel chooses, or torch."""
        plan, rows = plan_of(body), self.rows
        tokens = [plan.choice.unit * units - 6 for units in self.units]
        entries = sum(entry_count(size, cells_of(body)) for size in tokens)
        make = torch.Generator().manual_seed(0)
        q = torch.randn(self.batch, HEADS, sum(rows), DIM, generator=make, dtype=torch.float64)
        k = torch.randn(self.batch, LISTS, entries, DIM, generator=make, dtype=torch.float64)
        lse = torch.randn(self.batch, HEADS, sum(rows), generator=make, dtype=torch.float64)
        spans = (None, None) if len(rows) == 1 else (spans_of(rows), spans_of(tokens))
        longest = max(rows) if len(rows) == 1 else max(tokens)
        assert plan.choice.score is not None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launches(module), "KERNELS_ON_CPU", by_kernel)
            of_lse = lse if plan.choice.score.probability else None
            found: Tensor = module.chosen_op(
                q, k, of_lse, LISTS, *spans, None, None, longest, sum(tokens), None, None, None
            )
        return found


def spans_of(sizes: Sequence[int]) -> Tensor:
    counts = torch.tensor(sizes, dtype=torch.int32)
    return torch.stack([counts.cumsum(0).int() - counts, counts], 1)


LATE = Call((5,), (36,))  # the last rows of a prefix: several steps of units
ONE = Call((1,), (53,), batch=3)  # a step of generation, in splits
CHUNKS = Call((5, 2, 3), (2, 19, 7))  # chunks of sequences of different lengths
BEGUN = Call((60,), (6,))  # queries that see few units
CALLS = {"late": LATE, "one": ONE, "chunks": CHUNKS}


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
@pytest.mark.parametrize(
    "body",
    [*BODIES[:3], *(pytest.param(body, marks=pytest.mark.full) for body in BODIES[3:]), WIDE, NEAR, EARLY, CUT],
)
def test_units_are_those_of_torch(kernels: Engine, body: str, call: Call) -> None:
    module = kernels(body)
    assert torch.equal(call.lists(body, module, True), call.lists(body, module, False))


@pytest.mark.parametrize("body", [WIDE, EARLY, CUT, *BODIES[:2]])
def test_units_are_those_of_the_oracle(kernels: Engine, body: str) -> None:
    pattern, module = pattern_of(body), kernels(body)
    inputs = inputs_of(pattern, Shape(9, 157, heads=HEADS, kv_heads=LISTS))
    expect_lists(module.choices(**inputs), pattern, inputs)


def test_the_random_patterns_cover_what_there_is() -> None:
    plans = [plan_of(body) for body in BODIES]
    assert {plan.reach for plan in [*plans, plan_of(WIDE)]} == {1, 2, 3}
    assert {plan.choice.unit_by for plan in plans} == {plan.choice.heads_by for plan in plans} == set(BY)
    assert any(plan.first < 0 for plan in plans)
    assert any(plan.first + len(plan.weights) > plan.ratio for plan in plans)  # cells that begin in a later unit


@pytest.mark.parametrize(
    "body",
    [*BODIES[:3], *(pytest.param(body, marks=pytest.mark.full) for body in BODIES[3:]), WIDE, NEAR, EARLY, CUT],
)
def test_each_entry_is_multiplied_once_and_adds_all_that_it_weighs(body: str) -> None:
    plan = plan_of(body)
    added = [(i - plan.ratio * reach, weight) for reach in range(plan.reach + 1)
             for i, weight in plan.weights_of(reach).items()]  # fmt: skip
    assert sorted(added) == list(enumerate(plan.weights))
    assert len(plan.weights_of(0)) == min(plan.ratio, len(plan.weights))


class Bug(NamedTuple):
    title: str
    body: str
    call: Call
    old: str
    new: str


BUGS = [
    Bug("nothing is kept for the next unit", NEAR, LATE, "score_1 += weight *", "score_1 += 0.0 *"),
    Bug("kept for the unit behind the next", WIDE, LATE, "begin, score_1, scored_1, score_2, scored_2,",
        "begin, score_2, scored_2, score_1, scored_1,"),
    Bug("every entry is kept for the next unit", NEAR, LATE, "seen & (i >= S.RATIO)", "seen"),
    Bug("every entry is kept for the unit behind the next", EARLY, LATE, "seen & (i >= S.RATIO * 2)", "seen"),
    Bug("entries that were kept are added again", NEAR, LATE, "tl.where(step < first, 4, 2)",
        "tl.where(step < first, 4, 0)"),
    Bug("columns begin with nothing", NEAR, LATE, "tl.range(first - 1,", "tl.range(first,"),
    Bug("only the first split knows the units before it", NEAR, ONE, "tl.range(first - 1,",
        "tl.range(tl.where(split == 0, first - 1, first),"),
    Bug("the first unit has no units before it", EARLY, BEGUN, "inside = (entry >= 0)",
        "inside = (entry >= 0) & (unit >= 0)"),
    Bug("the largest of a unit alone", EARLY, LATE, "score_1 = tl.maximum(score_1,",
        "score_1 = tl.maximum(score_1 - 9,"),
    Bug("units ahead of the first step are ranked", NEAR, LATE, "(step >= first) & (k_first", "(k_first"),
    Bug("the best are merged by a comparison too few", NEAR, LATE, "tl.static_range(STAGES)",
        "tl.static_range(STAGES - 1)"),
    Bug("the next unit weighs as the first", CUT, LATE, "unit + 1,", "unit,"),
]  # fmt: skip


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.title.replace(" ", "_"))
def test_a_bug_is_seen(kernels: Engine, bug: Bug, tmp_path: Path) -> None:
    module = kernels(broken(printed(bug.body), bug.old, bug.new, tmp_path))
    assert not torch.equal(bug.call.lists(bug.body, module, True), bug.call.lists(bug.body, module, False))
