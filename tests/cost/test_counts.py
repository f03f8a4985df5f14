"""Counts at any length against counts query by query, and formulas against counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy

from spdsl.cost.formulas import N, formula
from spdsl.cost.kernels import Kernel, Options
from spdsl.cost.machine import Machine
from spdsl.cost.parameter_formulas import parameter_formula
from spdsl.cost.phases import Stage, kernels
from spdsl.cost.show_formulas import show_formulas
from spdsl.ir.pattern import Phase
from spdsl.ir.plan import Plan
from spdsl.passes.count import Count, Number, Shape
from spdsl.targets import find
from tests.cost.plans import CHOSEN, STATIC, plan, plan_of_text

WINDOW = sympy.Symbol("window", integer=True)
SHAPE = Shape(heads=4, kv_heads=2, qk=16, v=16)


def by_query(found: Plan, length: int) -> dict[str, int]:
    own = Count(found, length, SHAPE)
    counted = {}
    for softmax in own.softmaxes(Phase.TRAIN):
        heads = range(own.heads(softmax.softmax))
        some = heads[:1] if softmax.units is not None else heads
        seen = sum(own.keys(softmax, q, range(h, h + 1)).value for h in some for q in range(length))
        counted[softmax.name] = seen * (len(heads) // len(some))
    return counted


@pytest.mark.parametrize("length", [5, 64, 131])
@pytest.mark.parametrize("name", [*STATIC, *CHOSEN])
def test_sums_are_those_of_every_query(name: str, length: int) -> None:
    found = plan(name, small=True)
    own = Count(found, length, SHAPE)
    assert {one.name: own.pairs(one).value for one in own.softmaxes(Phase.TRAIN)} == by_query(found, length)


@pytest.mark.parametrize("name", [*STATIC, "nsa", "moba", "msa_minimax"])
def test_formulas_are_the_counts(name: str) -> None:
    found = plan(name, small=True)
    for softmax in Count(found, 64, SHAPE).softmaxes(Phase.TRAIN):

        def pairs(length: int, name: str = softmax.name) -> int:
            own = Count(found, length, SHAPE)
            return next(own.pairs(one).value for one in own.softmaxes(Phase.TRAIN) if one.name == name)

        units = {"sparse_transformer": [6], "dilated": [3], "nsa": [4, 16], "moba": [16], "msa_minimax": [16]}
        known = formula(pairs, units.get(name, ()), whole=48)
        assert known is not None
        for length in (known.start + 48 * known.modulus, 3 * known.start + 144 * known.modulus):
            length -= length % known.modulus
            assert known.at(length) == pairs(length)


def test_a_window_is_two_terms() -> None:
    found = plan("sliding_window", window=100)
    known = formula(lambda n: Count(found, n, SHAPE).pairs(found.softmaxes[0]).value)
    assert known is not None
    assert known.modulus == 1
    assert known.expression == 4 * (100 * N - 100 * 99 // 2)


def test_below_its_start_a_formula_does_not_answer() -> None:
    known = formula(lambda n: min(n, 300))
    assert known is not None
    assert known.start == 1024
    with pytest.raises(ValueError, match="from 1024 on"):
        known.at(100)


@pytest.mark.parametrize("count", [lambda n: n**3, lambda n: n.bit_length()])
def test_what_is_no_polynomial_has_no_formula(count: object) -> None:
    assert formula(count) is None  # type: ignore[arg-type]


def test_a_window_as_long_as_the_sequence_costs_as_much_as_all() -> None:
    wide, every = (plan("sliding_window", window=512), plan("causal"))
    for stage in (Stage.FORWARD, Stage.BACKWARD):
        one, two = (kernels(found, stage, 512, SHAPE, Machine("sm_90", 132), Options()) for found in (wide, every))
        assert [(k.flops, k.machine, k.bytes) for k in one] == [(k.flops, k.machine, k.bytes) for k in two]


def test_more_window_costs_more() -> None:
    def flops(window: int) -> list[int]:
        found = kernels(plan("sliding_window", window=window), Stage.FORWARD, 4096, SHAPE, Machine("sm_90"), Options())
        return [found[0].flops.value, found[0].machine.value]

    costs = [flops(window) for window in (1, 64, 200, 1024, 4096)]
    assert costs == sorted(costs)


def test_where_tensors_decide_counts_are_bounds() -> None:
    def forward(name: str, options: Options) -> Kernel:
        found = kernels(plan(name), Stage.FORWARD, 1024, SHAPE, Machine("sm_90"), options)
        return next(one for one in found if one.name == "attend_forward")

    most, dense = forward("document", Options()), forward("causal", Options())
    thin = forward("document", Options(density=0.1))
    assert not most.flops.exact
    assert not most.machine.exact
    assert (most.flops.value, most.machine.value) == (dense.flops.value, dense.machine.value)
    assert thin.flops.value == pytest.approx(most.flops.value / 10, rel=1e-6)


def test_neighbours_that_choose_alike_visit_less() -> None:
    def machine(overlap: float) -> int:
        found = kernels(
            plan("nsa"), Stage.FORWARD, 8192, Shape(1, 64, 4, 192, 128), Machine("sm_90"), Options(1, overlap)
        )
        return next(one.machine.value for one in found if one.name == "fine_forward")

    assert machine(1.0) < machine(0.5) < machine(0.0)
    assert machine(0.0) < 4 * machine(1.0)  # four queries share a tile, and their own blocks


def pairs(length: int, window: int) -> int:
    """Of a causal window."""
    return sum(min(q + 1, window) for q in range(min(length, window))) + max(0, length - window) * window


def test_a_surface_is_the_count_away_from_its_points() -> None:
    known = parameter_formula(pairs, WINDOW, 48, 64)
    assert known is not None
    assert (known.first, known.step) == (48, 1)
    for length, window in ((4096 + 64 * 5, 77), (65536, 500)):
        assert known.expression.xreplace({N: length, WINDOW: window}) == pairs(length, window)


def test_a_surface_of_blocks_is_for_whole_blocks() -> None:
    known = parameter_formula(lambda length, window: pairs(length, -(-window // 64) * 64), WINDOW, 128, 64)
    assert known is not None
    assert known.step == 64


@pytest.mark.parametrize(
    "count",
    [
        lambda length, window: length * window**3,
        lambda length, window: length * min(window, 120),
        lambda length, window: length * (window % 7),
        lambda length, window: None if window > 102 else pairs(length, window),
    ],
    ids=["degree", "bend", "remainder", "refused"],
)
def test_what_is_no_polynomial_of_both_has_no_surface(count: Callable[[int, int], int | None]) -> None:
    assert parameter_formula(count, WINDOW, 100, 1) is None


def test_lists_of_the_caller_are_counted_full() -> None:
    """Up to their bound, or all that begin before their query; the declared share thins pairs, tiles and keys."""
    shape = Shape(1, 8, 2, 64, 64)

    def counted(body: str, stage: Stage, **options: float) -> Kernel:
        plan = plan_of_text(f"pattern lists {{ causal {body} return attend(t) }}")
        own = kernels(plan, stage, 1000, shape, Machine("sm_90", 132), Options(**options))
        return next(one for one in own if one.name in ("attend_forward", "attend_decode"))

    pairs = 8 * sum(min(q + 1, 60) for q in range(1000))
    found = counted("t = given(most = 60)", Stage.FORWARD)
    assert found.flops == Number(pairs * 4 * 64, exact=False)
    assert counted("t = given()", Stage.FORWARD).flops == Number(8 * 500_500 * 4 * 64, exact=False)
    for stage in (Stage.FORWARD, Stage.DECODE):
        whole, half = (counted("t = given(most = 60)", stage, density=share) for share in (1.0, 0.5))
        assert 2 * half.flops.value == whole.flops.value
        assert 2 * half.machine.value == whole.machine.value
    # 60 tokens, in blocks of 64 gathered ones; the heads of a list as rows of 16
    assert counted("t = given(most = 60)", Stage.DECODE).machine == Number(2 * 16 * 64 * 2 * 128, exact=False)


def test_formulas_of_short_units_are_the_counts() -> None:
    plan = plan_of_text("pattern short { causal t = given(unit = 6, most = 40) return attend(t) }")
    for line in show_formulas(plan, Stage.FORWARD, Shape(1, 8, 2, 64, 64), find("h100"), Options()):
        assert "no polynomial" not in line, line


@pytest.mark.parametrize("stage", [Stage.FORWARD, Stage.BACKWARD, Stage.DECODE])
def test_numbers_of_pairs_are_read_once_and_loaded_by_each_head(stage: Stage) -> None:
    """A byte of the mask and a number of the bias for each visible pair, beside what the same kernels read without."""
    bodies = (
        "m = tensor(query, token, bool) b = tensor(head, query, token) "
        "return attend(where(m[q][k]), bias = b[h][q][k])",
        "m = tensor(token, bool) b = tensor(head) return attend(where(m[k]), bias = b[h])",
    )
    given, plain = (
        [
            one
            for one in kernels(plan_of_text(f"pattern p {{ causal {body} }}"), stage, 100, SHAPE, Machine("sm_90", 1))
            if one.name in ("attend_forward", "attend_dq", "attend_dkdv", "attend_decode")
        ]
        for body in bodies
    )
    pairs = 100 if stage is Stage.DECODE else 5050
    assert len(given) == len(plain) == (2 if stage is Stage.BACKWARD else 1)
    for one, other in zip(given, plain, strict=True):
        assert one.bytes.value - other.bytes.value == pairs * (1 + SHAPE.heads * 4)
        assert one.moved.value - other.moved.value == pairs * SHAPE.heads * (1 + 4)
