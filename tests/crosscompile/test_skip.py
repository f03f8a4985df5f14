"""Kernels that skip tiles, at the published tile of 128 x 128: they fit, multiply once, and read V behind the vote."""

from __future__ import annotations

import re

import pytest

pytestmark = pytest.mark.crosscompile

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from pathlib import Path  # noqa: E402

import spdsl  # noqa: E402
from spdsl import targets  # noqa: E402
from spdsl.machine.crosscompile import built  # noqa: E402
from spdsl.machine.launches import Launch  # noqa: E402
from spdsl.machine.survey import survey  # noqa: E402
from spdsl.resources import folder  # noqa: E402
from tests.crosscompile.kernels import kernels, kind, load  # noqa: E402
from tests.crosscompile.spills import FEW  # noqa: E402
from tests.library import broken  # noqa: E402

# Of the forward on sm_80: sums and scores of 16 rows of 128 keys and 128 dims, and Q, are most of what a warp has.
SPILLS = {("sm_80", "forward"): FEW + 2}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_kernels(target: str) -> None:
    wanted = lambda launch: launch.kernel.fn.__name__.endswith(("_forward", "_decode"))  # noqa: E731
    found = list(kernels("blasst", target, "bf16", (128, 128), ("train", "prefill", "decode"), wanted))
    assert {kind(one) for one in found} == {"forward", "decode"}
    for one in found:
        assert one.ok, f"{one.kernel}: {one.error}"
        assert one.fits, f"{one.kernel}: {one.occupancy}"
        assert one.spills <= SPILLS.get((target, kind(one)), 0), f"{one.kernel}: {one.spills} spills"
        assert one.tensor_core_instructions > 0, one.kernel
        assert one.computed == 1, f"{one.kernel}: {one.products}"


def loads(launch: Launch) -> tuple[int, int]:
    """Vector loads of global memory in the PTX: before the branch that the exponentials follow, and behind it."""
    lines = built(launch, targets.find("sm_90")).asm["ptx"].splitlines()
    first_exponential = next(i for i, line in enumerate(lines) if "ex2.approx" in line)
    branch = max(i for i, line in enumerate(lines[:first_exponential]) if re.search(r"@%p\d+ bra", line))
    wide = [i for i, line in enumerate(lines) if re.search(r"ld\.global(\.\w+)*\.v4", line)]
    return sum(i < branch for i in wide), sum(i > branch for i in wide)


def forward_of(module: object) -> Launch:
    found = survey(module, ("bf16",), ((128, 128),), targets.find("sm_90"))
    return next(one for one in found if one.kernel.fn.__name__.endswith("_forward") and one.workload.phase == "train")


def test_values_are_read_behind_the_branch(tmp_path: Path) -> None:
    """Q and K before it, as many of each as of V. Where V is loaded first, nothing is left behind it."""
    before, behind = loads(forward_of(load("blasst")))
    assert before == 2 * behind > 0
    text, load_values = spdsl.compile(folder("patterns") / "blasst.spat").text, "rt.load_values(keys, block, True, C)"
    vote = "    if votes == 2:\n"
    early = broken(
        text.replace(f"        v0, v1 = {load_values}\n", ""), vote, f"    v0, v1 = {load_values}\n{vote}", tmp_path
    )
    assert loads(forward_of(early)) == (before + behind, 0)
