"""The numbers in the findings, against sums and draws that are done the long way."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import spdsl
from spdsl import compiler
from spdsl.budget import TooMuch, at_most
from spdsl.checks.int32 import MOST
from spdsl.checks.pages import spread
from spdsl.checks.share import union
from spdsl.checks.view import Setting, views
from spdsl.diagnostics import Source
from spdsl.passes.series import total
from spdsl.primitives.grains import nearest
from spdsl.syntax.read import read
from spdsl.targets import find
from tests.checks.cases import pattern

PATTERNS = sorted((Path(__file__).resolve().parents[2] / "patterns").glob("*.spat"))


@given(st.integers(1, 200), st.sampled_from([16, 32, 64, 128]))
def test_spread_counts_the_blocks_that_units_touch(unit: int, block: int) -> None:
    """Over so many units that they fill whole blocks."""
    touched = sum((i * unit + unit - 1) // block - i * unit // block + 1 for i in range(block))
    assert spread(unit, block) == pytest.approx(touched * block / (block * unit))
    assert spread(unit, block) >= 1


@given(st.integers(1, 5000), st.integers(1, 200))
def test_the_nearest_multiple(number: int, step: int) -> None:
    found = nearest(number, step)
    assert found % step == 0
    assert found > 0
    assert all(abs(found - number) <= abs(i * step - number) for i in range(1, number // step + 3))


@pytest.mark.parametrize("chosen, units, lists", [(16, 1024, 16), (4, 32, 8), (10, 10, 3), (1, 50, 2)])
def test_the_expected_union_is_that_of_draws(chosen: int, units: int, lists: int) -> None:
    draw = random.Random(0)
    sizes = [len({unit for _ in range(lists) for unit in draw.sample(range(units), chosen)}) for _ in range(2000)]
    assert union(chosen, units, lists) == pytest.approx(sum(sizes) / len(sizes), rel=0.02)


def codes(body: str, **setting: object) -> set[str]:
    return {one.code for one in compiler.check(Source(pattern(body)), {}, Setting(**setting))}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "group, told", [(1, False), (2, False), (3, True), (4, False), (7, True), (8, False), (15, False)]
)
def test_a_group_is_told_about_from_an_eighth_of_waste_on(group: int, told: bool) -> None:
    """7 of 8 rows is an eighth; 15 of 16 less."""
    body = f"heads query = {2 * group}, kv = 2 r = softmax(dot(compress(64))) return attend(top_k(4, score = r))"
    assert ("W501" in codes(body)) is told


@pytest.mark.parametrize("length, told", [(46341, False), (46342, True)])
def test_products_of_positions_exceed_32_bits_from_the_root_on(length: int, told: bool) -> None:
    """Positions end at length - 1, and 46340 ** 2 is the last square below 2 ** 31."""
    assert ((length - 1) ** 2 > MOST) is told
    body = "return attend(where(q * k < 99))"
    assert ("E521" in codes(body, length=length)) is told


def test_short_units_count_as_whole_ones_and_are_not_made_for_pages() -> None:
    """dK and dV walk 2^17 tiles of 8 queries, with 2^13 whole units of 16 tokens each: 2^30."""
    body = "heads query = 32, kv = 4 dim qk = 128 expect(batch = 8, page = 64) t = given(most = 2048) return attend(t)"
    assert codes(body, length=2**17) == set()
    assert "E521" in codes(body, length=2**18)


def test_sums_that_stay_small_are_fine() -> None:
    body = "heads query = 8, kv = 8 return attend(where(abs(q - k) * 16384 < 99 * h + length))"
    assert "E521" not in codes(body, length=2**17)
    assert "E521" in codes(body, length=2**17 + 16)


def test_the_length_of_the_command_replaces_that_of_the_file() -> None:
    body = "expect(length = 64) return attend(where(q * k < 99))"
    assert "E521" not in codes(body)
    assert "E521" in codes(body, length=65536)


def test_a_target_is_judged_with_its_own_tables() -> None:
    source = Source(pattern("return attend(all)"))
    plan = compiler.plan_of(source, None, {})
    (tree,) = compiler.parse(source, compiler.Report(source)).patterns
    found = list(views(plan, source, tree, Setting((find("h200"), find("mi300x")))))
    assert [view.architecture for view in found] == ["sm_90", "gfx942"]
    (usual,) = views(plan, source, tree, Setting())
    assert (usual.target, usual.architecture, usual.expected.length) == (None, "sm_90", None)


@pytest.mark.parametrize("path", PATTERNS, ids=lambda path: path.stem)
def test_published_patterns_are_quiet(path: Path) -> None:
    assert compiler.check(read(path), {}) == []


@pytest.mark.parametrize(
    "sets",
    [
        "where(q % 9973 == k % 9973) | where(k % 7919 == 0) | where(q % 6007 == k % 101)",
        " | ".join(f"strided({n})" for n in (3, 5, 7, 11, 13, 17, 19, 23)),
        "where((q // 17 + k // 13) % 2 == 0)",
        "where(q * k % 7 < 3)",
    ],
    ids=["long periods", "many periods", "two units", "neither affine nor periodic"],
)
def test_no_set_makes_counting_endless(sets: str) -> None:
    began = time.process_time()
    spdsl.check(f"pattern p {{ causal expect(length = 1000000) return attend({sets}) }}")
    assert time.process_time() - began < 5


def test_counting_ends_where_it_may_do_no_more() -> None:
    with pytest.raises(TooMuch), at_most(400):
        total(lambda i, trace: trace.floor(i * i, 7), 1000)
