"""Units by their part of all mass: those of the definition, whatever the scores, ranked, cut and by torch."""

from __future__ import annotations

from math import fsum, inf, log, nan
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import spdsl
from spdsl.oracle import dense
from tests.library import broken
from tests.numerics.cases import Inputs, Shape, inputs_of
from tests.numerics.conftest import Engine
from tests.numerics.patterns import pattern_of, text_of
from tests.numerics.selected import by_rank, expect_lists
from tests.numerics.test_attend_paged import check, filled, with_states
from tests.numerics.test_cut import cut_module, cut_text
from tests.numerics.test_selection import checked
from tests.numerics.test_selection_layouts import check_chunks, check_packed, check_padded
from tests.quick import quick
from tests.sanitizer.mode import sanitized

MASS = {
    "of a head": by_rank("top_p(0.6, score = softmax(rank), share = head, unit = max(16), most = 4, force = last(1))"),
    "of a group, no more than": by_rank(
        "top_p(0.7, score = softmax(rank), unit = sum(16), most = 3, side = below, least = 1)"
    ),
    "any number": by_rank("top_p(0.8, score = softmax(rank), share = max(group), unit = sum(16), force = first(1))"),
    "a part of a head": by_rank(
        "top_p(p[h], score = softmax(rank), share = head, unit = sum(16), most = 4, least = n, "
        "within = where(k >= 16))",
        more="causal p = tensor(head) n = tensor(int)",
    ),
    "tiles of 24 rows": by_rank(
        "top_p(0.5, score = softmax(rank), unit = sum(16), rows = mean(24), force = last(1))", more=""
    ),
}
NAMES = list(MASS)
CAUSAL = [name for name in NAMES if "rows" not in MASS[name]]


@pytest.mark.parametrize("name", quick(NAMES, NAMES[:1]))
def test_lists_and_results(engine: Engine, name: str) -> None:
    shape = Shape(21, 75, 2, 4, 2) if engine.name == "interpreted" else Shape(33, 83, 2, 4, 2)
    checked(MASS[name], shape, engine(MASS[name]))


@pytest.mark.parametrize("name", [name for name in NAMES if "most" in MASS[name]])
def test_lists_that_are_cut(kernels: Engine, name: str, tmp_path: Path) -> None:
    checked(MASS[name], Shape(17, 75, heads=4, kv_heads=2), kernels(cut_module(MASS[name], tmp_path)))


@pytest.mark.parametrize("name", NAMES)
def test_packed_and_padded(engine: Engine, name: str) -> None:
    if engine.name == "interpreted" and name not in NAMES[:2]:
        pytest.skip("the same kernels in fewer patterns")
    check_packed(MASS[name], engine(MASS[name]), [0, 21, 38])
    check_padded(MASS[name], engine(MASS[name]), [21, 0, 18])


@pytest.mark.parametrize("name", CAUSAL)
def test_chunks_and_steps(engine: Engine, name: str) -> None:
    if engine.name == "interpreted" and name not in NAMES[1:3]:
        pytest.skip("the same kernels in fewer patterns")
    check_chunks(MASS[name], engine(MASS[name]), 16, [17], 2, 2)


@pytest.mark.parametrize("name", CAUSAL)
def test_splits_of_a_step(engine: Engine, name: str) -> None:
    """One query of 70 units: its programs rank a share each, and the mass of all is that of all of them."""
    pattern = pattern_of(MASS[name])
    inputs = inputs_of(pattern, Shape(1, 70 * 16, batch=2))
    expect_lists(engine(MASS[name]).choices(**inputs), pattern, inputs)


@pytest.mark.parametrize("name", CAUSAL)
def test_pages_of_the_caller(cpu: Engine, name: str) -> None:
    module, pattern = cpu(MASS[name]), pattern_of(MASS[name])
    pages = filled(pattern, [(40, 9, -1), (50, 1, 0), (0, 1, -1), (7, 7, -1)], 16)
    check(module, pattern, with_states(module, pattern, pages, 9))


BY_HAND = (
    "causal p = tensor() {more} index = stream(value = none) units = compress(16, of = index) "
    "chosen = top_p(p, score = softmax(dot(units, scale = 1)), share = head, most = {most}{rest}) return attend(chosen)"
)
ABOVE, BELOW = BY_HAND.format(more="", most=8, rest=""), BY_HAND.format(more="", most=8, rest=", side = below")
FORCED = BY_HAND.format(more="", most=8, rest=", force = first(1)")
FORCED_BELOW = BY_HAND.format(more="", most=8, rest=", force = first(1), side = below")
LEAST = BY_HAND.format(more="", most=3, rest=", least = 2")
EIGHTHS = [1, 2, 3, 1, 1]  # the mass of five closed units
Case = tuple[str, list[float], float, list[int]]
CASES: list[Case] = [
    (ABOVE, EIGHTHS, 0.374, [2]), (ABOVE, EIGHTHS, 0.376, [1, 2]), (ABOVE, EIGHTHS, 0.626, [0, 1, 2]),
    (ABOVE, EIGHTHS, 0.874, [0, 1, 2, 3]), (ABOVE, EIGHTHS, 0.876, [0, 1, 2, 3, 4]),
    (ABOVE, EIGHTHS, 1, [0, 1, 2, 3, 4]), (ABOVE, EIGHTHS, 7, [0, 1, 2, 3, 4]),
    (ABOVE, EIGHTHS, inf, [0, 1, 2, 3, 4]), (ABOVE, EIGHTHS, 0, []),
    (ABOVE, EIGHTHS, -1, []), (ABOVE, EIGHTHS, nan, []), (ABOVE, EIGHTHS, -inf, []),
    (BELOW, EIGHTHS, 0.374, []), (BELOW, EIGHTHS, 0.376, [2]), (BELOW, EIGHTHS, 0.626, [1, 2]),
    (BELOW, EIGHTHS, 0.751, [0, 1, 2]), (BELOW, EIGHTHS, 1, [0, 1, 2, 3, 4]), (BELOW, EIGHTHS, nan, []),
    (FORCED, EIGHTHS, 0.1, [0]), (FORCED, EIGHTHS, 0.49, [0, 2]), (FORCED, EIGHTHS, 0.51, [0, 1, 2]),
    (FORCED_BELOW, EIGHTHS, 0.1, [0]), (FORCED_BELOW, EIGHTHS, 0.49, [0]), (FORCED_BELOW, EIGHTHS, 0.51, [0, 2]),
    (FORCED, EIGHTHS, nan, [0]), (FORCED, EIGHTHS, 1, [0, 1, 2, 3, 4]),
    (LEAST, EIGHTHS, 0.1, [1, 2]), (LEAST, EIGHTHS, 0.7, [0, 1, 2]), (LEAST, EIGHTHS, 1, [0, 1, 2]),
    (LEAST, EIGHTHS, 0, [1, 2]),
    (ABOVE, [1] * 5, 0.5, [0, 1, 2]), (BELOW, [1] * 5, 0.5, [0, 1]), (ABOVE, [1] * 5, 0.999, [0, 1, 2, 3, 4]),
    (ABOVE, [0, 0, 1, 0, 0], 0.999, [2]), (ABOVE, [0, 0, 1, 0, 0], 1, [2]), (BELOW, [0, 0, 1, 0, 0], 0.999, []),
    (FORCED, [0, 0, 1, 0, 0], 1, [0, 2]), (ABOVE, [1, 1e-30, 1e-30, 0, 1e-30], 0.9, [0]),
    (ABOVE, [1, 1e-30, 1e-30, 0, 1e-30], 1, [0, 1, 2, 4]),
]  # fmt: skip


def of_mass(body: str, cases: list[tuple[list[float], float]]) -> Inputs:
    """A sequence for each case, whose one row gives five closed units this mass, and any number p. The last is open."""
    inputs = inputs_of(pattern_of(body), Shape(1, 95, len(cases), 1))
    inputs["q"], inputs["k_index"] = torch.zeros_like(inputs["q"]), torch.zeros_like(inputs["k_index"])
    inputs["q"][..., 0] = 1
    logits = [[log(mass) if mass else -800.0 for mass in masses] for masses, _ in cases]
    inputs["k_index"][:, 0, :80, 0] = torch.tensor(logits, dtype=torch.float64).repeat_interleave(16, -1)
    return {**inputs, "p": torch.tensor([p for _, p in cases], dtype=torch.float64)}


@pytest.mark.parametrize("way", ["ranked", "cut"])
@pytest.mark.parametrize("body", dict.fromkeys(body for body, *_ in CASES))
def test_lists_by_hand(engine: Engine, body: str, way: str, tmp_path: Path) -> None:
    if way == "cut" and engine.name == "cpu":
        pytest.skip("torch has one way")
    module = engine(cut_module(body, tmp_path) if way == "cut" else body)
    inputs = of_mass(body, [(masses, p) for own, masses, p, _ in CASES if own == body])
    found = module.choices(**inputs)["chosen"][:, 0, 0].tolist()
    assert [[unit for unit in own if unit >= 0] for own in found] == [units for own, *_, units in CASES if own == body]
    expect_lists(module.choices(**inputs), pattern_of(body), inputs)


def kept(scores: Tensor, units: Tensor) -> float:
    return fsum(scores[units[units >= 0].long()].tolist())


@pytest.mark.parametrize("way", ["ranked", "cut"])
@pytest.mark.parametrize("seed", range(3))
def test_the_fewest_that_hold_it(engine: Engine, seed: int, way: str, tmp_path: Path) -> None:
    """The mass is at least p, and less the least of the chosen it is not; forced units aside."""
    if way == "cut" and engine.name == "cpu":
        pytest.skip("torch has one way")
    module = engine(cut_module(ABOVE, tmp_path) if way == "cut" else ABOVE)
    made = torch.Generator().manual_seed(seed)
    cases = [
        ((torch.rand(5, generator=made) ** power + 1e-3).tolist(), float(torch.rand((), generator=made)))
        for power in (0.0, 0.3, 1.0, 4.0, 20.0)
    ]
    found = module.choices(**of_mass(ABOVE, cases))["chosen"][:, 0, 0]
    for (masses, p), units in zip(cases, found, strict=True):
        scores = torch.tensor(masses, dtype=torch.float64)
        mass, wanted = kept(scores, units), p * fsum(masses)
        assert mass >= wanted - 1e-5
        assert mass - float(scores[units[units >= 0].long()].min()) < wanted + 1e-5


class Bug(NamedTuple):
    """One change of the library, and the body whose lists must tell."""

    what: str
    way: str
    old: str
    new: str
    body: str = FORCED


BUGS = [
    Bug("forced mass is left out", "ranked", "tl.cumsum(own, 1) + mass.forced[:, None]", "tl.cumsum(own, 1)"),
    Bug("forced units add no mass", "ranked", "tl.sum(score, 1), mass.forced",
        "tl.sum(tl.where(forced, 0.0, score), 1), mass.forced"),
    Bug("the last unit is not needed", "ranked", "upto - own < wanted", "upto < wanted", ABOVE),
    Bug("a whole part takes units without mass", "ranked", "(own > 0) & (enough", "(own >= 0) & (enough", ABOVE),
    Bug("forced units have no mass in memory", "cut", "tl.where(bits >= 0, bits,", "tl.where(bits >= 0, 0,"),
    Bug("ties are one unit", "cut", "tl.maximum(tl.ceil(lacking).to(tl.int32), 1)", "1", ABOVE),
    Bug("as much is too little", "cut", "mass >= wanted", "mass > wanted * 1.2", ABOVE),
]  # fmt: skip


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.what)
def test_a_bug_is_seen(kernels: Engine, bug: Bug, tmp_path: Path) -> None:
    text = cut_text(bug.body) if bug.way == "cut" else spdsl.compile(text_of(bug.body)).text
    inputs = of_mass(bug.body, [(masses, p) for own, masses, p, _ in CASES if own == bug.body])
    module = kernels(broken(text, bug.old, bug.new, tmp_path))
    with sanitized(), pytest.raises(AssertionError):
        expect_lists(module.choices(**inputs), pattern_of(bug.body), inputs)


def test_the_reference_is_the_definition() -> None:
    for body, masses, p, units in CASES:
        found = dense.choices(pattern_of(body), of_mass(body, [(masses, p)]))["chosen"][0, 0, 0]
        assert [unit for unit in found.tolist() if unit >= 0] == units, (masses, p)
