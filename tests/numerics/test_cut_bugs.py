"""One change at a time in the kernels that cut lists; the checks beside must see each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

import spdsl
from tests.library import broken
from tests.numerics.cases import Shape, inputs_of
from tests.numerics.conftest import Engine
from tests.numerics.patterns import module_from, pattern_of, text_of
from tests.numerics.selected import SELECTED, by_rank, expect_lists, recorded
from tests.numerics.test_cut import cut_text, tiles
from tests.numerics.test_selection_layouts import check_chunks, check_packed
from tests.sanitizer.mode import sanitized

Check = Callable[[str, ModuleType], None]
TOP = by_rank("top_k(2, score = rank, share = max(group), unit = max(16), force = last(1))")
APART = by_rank("top_k(2, score = rank, share = head, unit = max(16))")
MANY = by_rank("top_k(18, score = rank, share = max(group), unit = max(16))", compress="16")
LOW = by_rank("top_k(4, score = rank, share = sum(group), unit = sum(16))")
PASSING = by_rank("threshold(0.2, score = rank, share = max(group), unit = max(16), least = 1, most = 4)")
FEW = by_rank("threshold(9, score = rank, share = max(group), unit = max(16), least = 3, within = where(k >= 32))")
WITHIN = by_rank("top_k(2, score = rank, share = max(group), unit = max(16), within = where(k // 16 != 1))")
FIRST = by_rank("top_k(2, score = rank, share = max(group), unit = max(16), force = last(1))", compress="32, 16")
BELOW = by_rank("top_k(4, score = rank, share = head, unit = sum(16), rows = max(3))", more="")
FOUR, THREE, TILES = tiles("of four"), tiles("of three"), SELECTED["tiles of 24 rows"]


def listed(body: str, module: ModuleType, shape: Shape = Shape(17, 80), ties: bool = False) -> None:  # noqa: B008
    """The lists alone."""
    pattern = pattern_of(body)
    inputs = inputs_of(pattern, shape)
    if ties:
        inputs["q"] = torch.zeros_like(inputs["q"])
    with recorded(module, pattern) as lists:
        module.attention(**inputs)
    expect_lists(lists, pattern, inputs)


def grouped(body: str, module: ModuleType) -> None:
    """As many heads as take several pieces."""
    listed(body, module, replace(Shape(17, 80), heads=4, kv_heads=2))


def longer(body: str, module: ModuleType) -> None:
    listed(body, module, Shape(50, 80))


def tied(body: str, module: ModuleType) -> None:
    """Equal scores in more units than are looked at at once."""
    listed(body, module, Shape(3, 400), ties=True)


def packed(body: str, module: ModuleType) -> None:
    check_packed(body, module, [0, 21, 38])


def apart(body: str, module: ModuleType) -> None:
    check_chunks(body, module, 16, [37], 1, 2)


class Bug(NamedTuple):
    title: str
    pattern: str
    check: Check
    old: str
    new: str


BUGS = [
    Bug("only the first digits are looked for", TOP, listed, "tl.range(0, 8)", "tl.range(0, 2)"),
    Bug("the unit at the cut is left out", TOP, listed, "+ equal <= ties", "+ equal < ties"),
    Bug("all units at the cut", MANY, tied, "(tie > 0) & (tl.cumsum(tie, 0) + equal <= ties)", "(tie > 0)"),
    Bug("ties of the units before are forgotten", MANY, tied, "equal += tl.sum(tie, 0)", "equal += 0"),
    Bug("places of the units before are forgotten", MANY, tied, "taken += tl.sum(own_taken, 0)", "taken += 0"),
    Bug("forced units need a score", FIRST, listed, "tl.where(forced, FORCED,", "tl.where(forced & may, FORCED,"),
    Bug("units that may not be chosen are", WITHIN, listed, "tl.where(may, score_bits(score), NOT_CUT)",
        "score_bits(score)"),
    Bug("negative scores rise with their bits", LOW, listed, "bits ^ ((bits >> 31) & 0x7FFFFFFF)", "bits"),
    Bug("least reaches beyond its candidates", FEW, listed, "tl.minimum(known, least)", "least"),
    Bug("all of them pass", PASSING, listed, "tl.where(wanted == passing, passing_bits, NOT_CUT)", "NOT_CUT"),
    Bug("the limit is not asked", PASSING, listed, "tl.minimum(known, least)), most)",
        "tl.minimum(known, least)), 99)"),
    Bug("nothing behind a list", PASSING, listed, "-1, tl.int32), place < tiles.most", "-1, tl.int32), place < 0"),
    Bug("units behind a tile's last query", TOP, listed, "tl.maximum(last, -1) // S.UNIT + 1",
        "tl.maximum(last, -1) // S.UNIT"),
    Bug("the first piece again and again", APART, grouped, "number = tiles.begin + number", "number += 0"),
    Bug("the bits of the first list head", APART, grouped, "(tl.cast(list_head, tl.int64) * tiles.rows + row)",
        "(tl.cast(list_head * 0, tl.int64) * tiles.rows + row)"),
    Bug("a list for the first query of a tile", FOUR, listed, "rows.count if S.ROWS > 1 and not S.TILED else 1", "1"),
    Bug("tiles begin with the call", FOUR, listed, "tile += floor_div(q_origin, S.ROWS)", "tile += q_origin // 99"),
    Bug("rows of the next tile count", BELOW, listed, "seen & (query < rows.count)", "seen"),
    Bug("the first rows of a tile alone", TILES, longer, "tl.range(0, tl.cdiv(rows.count, S.LANES)", "tl.range(0, 1"),
    Bug("a mean over all lanes", THREE, listed, "total / tl.maximum(count, 1)", "total / 4"),
    Bug("tiles of the first sequence", TOP, packed, "tile = number - tl.load(tiles.first + s)", "tile = number"),
    Bug("rows of the first sequence in a step", TOP, apart, "s, tile = number // tiles.each, number % tiles.each",
        "s, tile = number * 0, number % tiles.each"),
]  # fmt: skip
UNBROKEN = sorted({(bug.pattern, bug.check.__name__) for bug in BUGS})


def _text(body: str) -> str:
    return spdsl.compile(text_of(body)).text if "rows =" in body else cut_text(body)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.title.replace(" ", "_"))
def test_a_bug_is_seen(kernels: Engine, bug: Bug, tmp_path: Path) -> None:
    module = kernels(broken(_text(bug.pattern), bug.old, bug.new, tmp_path))
    with sanitized(), pytest.raises(AssertionError):  # a wrong list is walked anywhere
        bug.check(bug.pattern, module)


@pytest.mark.parametrize("pattern, check", UNBROKEN)
def test_the_same_checks_pass_without_a_bug(kernels: Engine, pattern: str, check: str, tmp_path: Path) -> None:
    globals()[check](pattern, kernels(module_from(_text(pattern), tmp_path / "generated.py")))
