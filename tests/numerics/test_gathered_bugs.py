"""One change at a time in what gathers keys and takes short units together; the checks beside must see each of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from tests.library import broken
from tests.numerics.cases import Shape, assert_same, generated, inputs_of, meant
from tests.numerics.conftest import Engine
from tests.numerics.patterns import pattern_of, printed
from tests.numerics.test_gathered import CHOSEN, GIVEN
from tests.numerics.test_selection import checked
from tests.numerics.test_selection_layouts import check_chunks, check_packed

Check = Callable[[str, ModuleType], None]
TOKENS, SIX, OF_HEADS, EIGHT = GIVEN["tokens"], GIVEN["units of 6"], GIVEN["tokens of heads"], CHOSEN["units of 8"]
KL = (
    "causal index = stream(value = none) asks = query() rank = dot(index, query = asks) "
    "chosen = top_k(7, score = rank, share = sum(group)) fine = attend(chosen & sliding(9)) "
    "return fine, kl(mass(fine), rank, share = mean(group))"
)


def whole(body: str, module: ModuleType) -> None:
    checked(body, Shape(20, 35), module)


def alone(body: str, module: ModuleType) -> None:
    """16 heads of a list leave one query per tile."""
    checked(body, Shape(5, 35, heads=16), module)


def wide(body: str, module: ModuleType) -> None:
    """Head dims that are no powers of two."""
    checked(body, Shape(5, 21, qk=40, v=24), module)


def packed(body: str, module: ModuleType) -> None:
    check_packed(body, module, [0, 21, 38])


def stepped(body: str, module: ModuleType) -> None:
    check_chunks(body, module, 16, [19], 2, 1)


def apart(body: str, module: ModuleType) -> None:
    check_chunks(body, module, 16, [37], 1, 2)


def repeated(body: str, module: ModuleType) -> None:
    """Each number of a list twice, none between them, some past the end: a list is a set."""
    pattern = pattern_of(body)
    inputs = inputs_of(pattern, Shape(9, 21))
    lists = inputs["t"][..., :20]
    inputs["t"] = torch.cat([lists, torch.full_like(lists[..., :2], -1), lists.flip(-1), lists[..., :2] + 99], -1)
    assert_same(generated(module, pattern, inputs), meant(pattern, inputs))


def bounded(body: str, module: ModuleType) -> None:
    inputs = inputs_of(pattern_of(body), Shape(9, 70))
    inputs["t"] = torch.arange(61).expand(1, 1, 9, -1)
    refused = ""
    try:
        module.attention(**inputs)
    except ValueError as error:
        refused = str(error)
    assert refused == "t: expected at most 60 units in a list, got 61"


class Bug(NamedTuple):
    title: str
    pattern: str
    check: Check
    old: str
    new: str


BOTH = [
    Bug("a number twice counts twice", TOKENS, repeated, "kept[..., 1:] &= units[..., 1:] != units[..., :-1]", "pass"),
    Bug("lists as they come", TOKENS, repeated, ".int().sort(-1).values\n    kept", ".int()\n    kept"),
    Bug("most is not asked", TOKENS, bounded, "expect(most is None or units", "expect(True or units"),
]  # fmt: skip
KERNELS = [
    Bug("places behind a list hold unit 0", TOKENS, alone,
        "tl.where(place < visit.count, unit * U.UNIT + within, keys.count)", "unit * U.UNIT + within"),
    Bug("units of one key more", SIX, whole, "key // U.UNIT, key % U.UNIT", "key // (U.UNIT + 1), key % U.UNIT"),
    Bug("the first key of a unit again and again", SIX, whole, "key // U.UNIT, key % U.UNIT", "key // U.UNIT, key * 0"),
    Bug("every block is the first", TOKENS, whole, "key = i * C.BLOCK_N + tl.arange(0, C.BLOCK_N)\n    return",
        "key = tl.arange(0, C.BLOCK_N)\n    return"),
    Bug("a last block that is not full left out", SIX, alone, "tl.cdiv(count * U.UNIT, C.BLOCK_N)",
        "count * U.UNIT // C.BLOCK_N"),
    Bug("the mask of the next unit", SIX, whole, "tl.load(visit.masks + place, mask=place < visit.count",
        "tl.load(visit.masks + place + 1, mask=place + 1 < visit.count"),
    Bug("the mask of the unit for a block of them", SIX, whole, "tl.load(visit.masks + place, mask=place < visit.count",
        "tl.load(visit.masks + i + 0 * place, mask=place < visit.count"),
    Bug("bits of units side by side", TOKENS, whole, "(key // (U.UNIT // U.PER) * U.LANES)",
        "(key // (U.UNIT // U.PER))"),
    Bug("bits of keys, not of units", SIX, whole, "(key // (U.UNIT // U.PER) * U.LANES)", "(key * U.LANES)"),
    Bug("the first word of a mask again and again", TOKENS, whole, "entry * U.WORDS + bit // 64",
        "entry * U.WORDS + 0 * bit"),
    Bug("one word for each entry", TOKENS, whole, "entry * U.WORDS + bit // 64", "entry + bit // 64"),
    Bug("bits of the first half of a word", TOKENS, whole, "(bit % 64 + lane)", "(bit % 32 + lane)"),
    Bug("the mask of the first block of a whole unit", GIVEN["units of 24 of heads"], whole,
        "key = part * C.BLOCK_N + tl.arange(0, C.BLOCK_N)\n        bit", "key = tl.arange(0, C.BLOCK_N)\n        bit"),
    Bug("whole units of one more", TOKENS, whole, "tiles.units // per, -1)", "tiles.units // (per + 1), -1)"),
    Bug("no room for the last whole unit", TOKENS, whole, "max(1, min(tiles.width, most)), mask",
        "max(1, min(tiles.width, most) - 1), mask"),
    Bug("bits of a unit in its neighbour", SIX, whole, "tiles.units % per, 0) * lanes",
        "(tiles.units + 1) % per, 0) * lanes"),
    Bug("bits of a second word in the first", TOKENS, whole, "slot * words + bit // 64", "slot * words"),
    Bug("keys of the first page", TOKENS, stepped, "pages + place // C.PAGE, mask=there",
        "pages + 0 * place, mask=there"),
    Bug("places in a page counted from the first one", TOKENS, stepped, "place = place % C.PAGE", "place = place"),
    Bug("keys that are not there are read", TOKENS, alone, "mask=there[:, None], other",
        "mask=there[:, None] | True, other"),
    Bug("columns behind the head dim", TOKENS, wide, "mask=there[:, None] & (column < DIM), other",
        "mask=there[:, None], other"),
    Bug("columns of the first part twice", TOKENS, wide, "load_columns(pointers, there, D0, D1, DIM, MASKED)",
        "load_columns(pointers, there, 0, D1, DIM, MASKED)"),
    Bug("the list of the first head in a step", OF_HEADS, apart, "(tl.cast(s, tl.int64) * tl.num_programs(1) + h)",
        "(tl.cast(s, tl.int64) * tl.num_programs(1))"),
    Bug("keys of a column have the first position", KL, whole, "(keys.origin + token)[:, None]",
        "(keys.origin + token * 0)[:, None]"),
    Bug("gathered keys have the first position", SIX, packed, "(keys.origin + token)[None, :])",
        "(keys.origin + token)[None, :] * 0)"),
]  # fmt: skip
CPU = [
    Bug("the bit of the next unit", SIX, whole, "1 << chosen % per", "1 << (chosen + 1) % per"),
    Bug("no mask", SIX, whole, "& 1).eq(0).unsqueeze(2)", "& 1).eq(-1).unsqueeze(2)"),
    Bug("bits of keys, not of units", SIX, whole, "torch.arange(sizes.unit) // (sizes.unit // sizes.per)",
        "torch.arange(sizes.unit) % sizes.per"),
]  # fmt: skip
UNBROKEN = sorted({(bug.pattern, bug.check.__name__) for bug in [*BOTH, *KERNELS, *CPU]})


@pytest.mark.parametrize("bug", [*BOTH, *KERNELS], ids=lambda bug: bug.title.replace(" ", "_"))
def test_a_bug_in_the_kernels_is_seen(kernels: Engine, bug: Bug, tmp_path: Path) -> None:
    module = kernels(broken(printed(bug.pattern), bug.old, bug.new, tmp_path))
    with pytest.raises(AssertionError):
        bug.check(bug.pattern, module)


@pytest.mark.parametrize("bug", [*BOTH, *CPU], ids=lambda bug: bug.title.replace(" ", "_"))
def test_a_bug_on_the_cpu_path_is_seen(cpu: Engine, bug: Bug, tmp_path: Path) -> None:
    module = cpu(broken(printed(bug.pattern), bug.old, bug.new, tmp_path))
    with pytest.raises(AssertionError):
        bug.check(bug.pattern, module)


@pytest.mark.parametrize("pattern, check", UNBROKEN)
def test_the_same_checks_pass_without_a_bug(engine: Engine, pattern: str, check: str) -> None:
    globals()[check](pattern, engine(pattern))
