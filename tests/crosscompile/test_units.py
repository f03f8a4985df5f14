"""Kernels over chosen units, and those that choose them, on four architectures; on Hopper all kernels of nsa."""

from __future__ import annotations

from itertools import product

import pytest

pytestmark = pytest.mark.crosscompile

pytest.importorskip("torch")
pytest.importorskip("triton")

import spdsl  # noqa: E402
from spdsl.machine.crosscompile import Compiled  # noqa: E402
from spdsl.machine.launches import Argument, Launch  # noqa: E402
from spdsl.runtime.select import cut_launch  # noqa: E402
from spdsl.runtime.units.packed import StepLse  # noqa: E402
from tests.crosscompile.kernels import Dims, kernels, kind, nsa_of_group, tuples_asked  # noqa: E402
from tests.crosscompile.spills import ALLOWED_UNITS, DQ_ON_HOPPER, UNITS_ELSEWHERE  # noqa: E402

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
ENDS = ("sm_90", "gfx942")  # for kernels without products, which the tables do not know: one of each vendor
MAIN = ("forward", "dq", "dkdv")
# 16 heads a list, of queries of the call and of an own index query; one head a list.
PATTERNS: tuple[tuple[str, Dims], ...] = (("nsa", (192, 128)), ("msa_minimax", (128, 128)), ("moba", (128, 128)))
HOPPER = {
    "nsa": [f"{branch}_{name}" for branch in ("coarse", "fine", "near") for name in MAIN],
    "msa_minimax": [*(f"fine_{name}" for name in MAIN), "_result_1_forward", "_result_1_dk"],
    "moba": [f"attend_{name}" for name in MAIN],
}
OPEN = [("bf16", (64, 64)), ("bf16", (128, 128)), ("fp16", (128, 128)), ("fp32", (64, 64)), ("fp32", (128, 128))]

# Every kernel beside the attention itself: entries made in three ways, their gradients, the gate, ranks at decode.
POOLED = """pattern pooled { causal
    means = compress(32, 16, by = mean)
    tops = compress(32, 16, before = 16, by = max)
    sums = compress(32, 16, before = 16, by = weighted)
    coarse = attend(means)
    chosen = top_k(4, score = mass(coarse), unit = 64, share = group, force = last(1))
    apart = top_k(4, score = mass(coarse), unit = 64, share = head, force = last(1))
    return gate(coarse, attend(tops), attend(sums), attend(chosen), attend(apart))
}"""
BESIDE = {"pool_entries", "spread_entries", "weight_sums", "gate_rows", "gate_gradients", "row_delta", "join_splits"}
BESIDE |= {"merge_pairs", "add_pairs"}

# `least` keeps units below the level until all splits are merged; so many units that a step of generation has splits.
BOUNDED = """pattern bounded { causal
    coarse = attend(compress(16))
    chosen = threshold(0.1, score = mass(coarse), share = group, force = last(1), least = 4, most = 16)
    return gate(coarse, attend(chosen))
}"""

# The same by numbers that the call says.
OF_THE_CALL = (
    BOUNDED.replace("causal", "causal level = tensor(kv_head) n = tensor(int)")
    .replace("0.1, score", "level[h], score")
    .replace("least = 4", "least = n")
)

OF_MASS = BOUNDED.replace("threshold(0.1,", "top_p(0.9,")

# Lists that two kernels make: long ones, and those of tiles of queries.
CUT = {
    "of mass": OF_MASS.replace("bounded", "of_mass").replace(", most = 16", ""),
    "long": """pattern long { causal
        coarse = attend(compress(32, 16))
        chosen = top_k(512, score = mass(coarse), unit = 64, share = group, force = first(1) | last(1))
        return gate(coarse, attend(chosen))
    }""",
    "tiled": """pattern tiled {
        coarse = attend(compress(64))
        chosen = threshold(0.01, score = mass(coarse), share = head, unit = max(64), rows = mean(64), least = 4)
        return gate(coarse, attend(chosen))
    }""",
    "of the call": """pattern of_the_call { causal
        n = tensor(int)
        coarse = attend(compress(32, 16))
        chosen = top_k(n, score = mass(coarse), unit = 64, share = group, force = last(1), most = 512)
        return gate(coarse, attend(chosen))
    }""",
}

# Units of 16 keys cut the blocks of the tables, which counted on 64.
SHORT = """pattern short { causal
    coarse = attend(compress(16))
    chosen = top_k(4, score = mass(coarse), unit = 16, share = group, force = last(1))
    return gate(coarse, attend(chosen))
}"""

# Lists of the caller, whose keys are gathered one by one.
GATHERED = """pattern gathered {{ causal
    heads query = {heads}, kv = 2
    t = given(unit = {unit}, most = 512)
    return attend(t)
}}"""

# A list of one head stands for the short groups everywhere; what msa_minimax adds is its own index query.
CASES = [(*pattern, target) for pattern in PATTERNS for target in TARGETS]
QUICK = [
    pytest.param(*case, marks=pytest.mark.full) if case[0] == "msa_minimax" and case[2] != "sm_90" else case
    for case in CASES
]


def of_units(launch: Launch) -> bool:
    return not {"U.UNIT", "S.UNIT"}.isdisjoint(launch.constexprs)


def check(found: list[Compiled], target: str) -> None:
    """Each compiles, fits, spills nothing (or what the table says), and multiplies by matrix instructions."""
    assert {kind(one) for one in found} >= {*MAIN, "select", "decode"}
    for one in found:
        assert one.ok, f"{one.kernel}: {one.error}"
        assert one.shared <= one.shared_limit, f"{one.kernel}: {one.shared} bytes of shared memory"
        assert one.fits, f"{one.kernel}: {one.occupancy}"
        most = ALLOWED_UNITS.get((target, kind(one)), UNITS_ELSEWHERE)
        assert one.spills <= most, f"{one.kernel}: {one.spills} spills"
        assert one.tensor_core_instructions > 0 or kind(one) in ("slots", "ranks"), one.kernel
        assert one.computed == 1, f"{one.kernel}: {one.products}"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("pattern, dims, target", QUICK)
def test_kernels(pattern: str, dims: Dims, target: str) -> None:
    check(list(kernels(pattern, target, "bf16", dims, ("train", "decode"), of_units)), target)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("pattern, dims", PATTERNS)
def test_hopper(pattern: str, dims: Dims) -> None:
    """Warp-group products alone, and nothing in local memory."""
    found = {one.kernel: one for one in kernels(pattern, "sm_90", "bf16", dims, ("train",))}
    for name in [*HOPPER[pattern], "chosen_select"]:
        assert found[name].ok, f"{name}: {found[name].error}"
        assert found[name].mma("wgmma") > 0, name
        assert found[name].mma("mma") == 0, name
        most = DQ_ON_HOPPER if name == "near_dq" else 0
        assert found[name].spills <= most, f"{name}: {found[name].spills} spills"
        assert found[name].computed == 1, f"{name}: {found[name].products}"


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype, dims", OPEN)
@pytest.mark.parametrize("group", [1, 2, 5, 8, 16])
def test_groups(group: int, dtype: str, dims: Dims, target: str) -> None:
    check(list(kernels(nsa_of_group(group), target, dtype, dims, ("train", "decode"), of_units)), target)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "target", [one if one in ENDS else pytest.param(one, marks=pytest.mark.full) for one in TARGETS]
)
def test_kernels_beside_attention(target: str) -> None:
    """They multiply no matrices; each compiles, fits and spills nothing."""
    found = list(
        kernels(
            spdsl.load(POOLED), target, "bf16", (128, 128), ("train", "decode"), lambda launch: launch.name in BESIDE
        )
    )
    names = {one.kernel for one in found}
    assert names == BESIDE, f"not launched: {BESIDE - names}"
    for one in found:
        assert one.ok, f"{one.kernel}: {one.error}"
        assert one.fits, f"{one.kernel}: {one.occupancy}"
        assert one.spills <= UNITS_ELSEWHERE, f"{one.kernel}: {one.spills} spills"


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("text", [BOUNDED, OF_THE_CALL, OF_MASS], ids=["constants", "of the call", "of mass"])
def test_a_threshold_with_least(text: str, target: str) -> None:
    names = ("chosen_select", "merge_ranks")
    found = list(
        kernels(spdsl.load(text), target, "bf16", (128, 128), ("train", "decode"), lambda one: one.name in names)
    )
    assert {one.kernel for one in found} == set(names)
    for one in found:
        assert one.ok, f"{one.kernel}: {one.error}"
        assert one.fits, f"{one.kernel}: {one.occupancy}"
        assert one.spills == 0, f"{one.kernel}: {one.spills} spills"


@pytest.mark.parametrize(
    "name, target",
    [
        pytest.param(
            name, target, marks=pytest.mark.full if name in ("of the call", "of mass") and target != "sm_90" else ()
        )
        for name in CUT
        for target in TARGETS
    ],
)
def test_lists_that_are_cut(name: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a cache of many units: the kernel then looks at the most that it does at once."""
    monkeypatch.setattr(cut_launch, "power_of_2", lambda units: 512)
    names = ("chosen_select", "cut_lists")
    phases = ("train", "prefill", "decode")
    found = list(kernels(spdsl.load(CUT[name]), target, "bf16", (128, 128), phases, lambda one: one.name in names))
    assert {one.kernel for one in found} == set(names)
    for one in found:
        assert one.ok, f"{one.kernel}: {one.error}"
        assert one.fits, f"{one.kernel}: {one.occupancy}"
        assert one.spills <= UNITS_ELSEWHERE, f"{one.kernel}: {one.spills} spills"
        assert one.computed == 1, f"{one.kernel}: {one.products}"


@pytest.mark.parametrize("target", ["sm_90", pytest.param("sm_80", marks=pytest.mark.full), "gfx942"])
def test_short_units_compute_nothing_twice(target: str) -> None:
    found = list(kernels(spdsl.load(SHORT), target, "bf16", (128, 128), ("train", "decode"), of_units))
    assert {kind(one) for one in found} >= {*MAIN, "select", "decode"}
    for one in found:
        assert one.ok, f"{one.kernel}: {one.error}"
        assert one.fits, f"{one.kernel}: {one.occupancy}"
        assert one.computed == 1, f"{one.kernel}: {one.products}"
        assert one.spills <= 2, (
            f"{one.kernel}: {one.spills} spills"
        )  # dK and dV keep to 128 registers for one block more


QUICK_GATHERED = {("sm_90", 1, 4, 128)}


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "target, unit, group, dim",
    [
        case if case in QUICK_GATHERED else pytest.param(*case, marks=pytest.mark.full)
        for case in product(TARGETS, (1, 4), (1, 4, 16), (64, 128, 192, 256))
    ],
)
def test_gathered_keys(target: str, unit: int, group: int, dim: int) -> None:
    """They need registers for their addresses, and have rows of their own in the tables."""
    module = spdsl.load(GATHERED.format(heads=2 * group, unit=unit))
    found = list(kernels(module, target, "bf16", (dim, dim), ("train", "decode"), of_units))
    assert {kind(one) for one in found} >= {*MAIN, "decode"}
    for one in found:
        assert one.ok, f"{one.kernel}: {one.error}"
        assert one.fits, f"{one.kernel}: {one.occupancy}"
        assert one.spills == 0, f"{one.kernel}: {one.spills} spills"
        assert one.computed == 1, f"{one.kernel}: {one.products}"
        assert one.tensor_core_instructions > 0 or kind(one) == "slots", one.kernel


def test_a_kernel_that_asks_whether_a_tuple_is_none_is_seen() -> None:
    nothing = Argument("sink", "constexpr")
    some = Argument("parts", "tuple", items=(Argument("lse", "*fp32"), nothing), container=StepLse)
    full = Argument("rows", "tuple", items=(Argument("lse", "*fp32"),), container=StepLse)
    text = "if parts is None and rows is None and parts.sink is None and all_parts is None:"
    assert tuples_asked((some, full), text) == ["parts is None"]
    assert tuples_asked((full, Argument("call", "tuple", items=(some,))), "call.parts is not None") == [
        "parts is not None"
    ]
