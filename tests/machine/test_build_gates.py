"""What a build refuses, from the numbers of compiled kernels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from spdsl.cli import measure
from spdsl.machine import build_gates
from spdsl.machine.crosscompile import Compiled
from spdsl.machine.machine_code import Code, read_amdgcn, read_sass
from spdsl.machine.occupancy import Occupancy
from spdsl.machine.reasons import reasons

CODE = Code(100, 0, 0, 0, (("wgmma", 8),), (("wgmma", 8),), (), 128)
GOOD = Compiled(
    "attend_forward", "h200", 8, 3, (("C.BLOCK_M", "128"), ("C.BLOCK_N", "64")), code=CODE, fits=True,
    occupancy=Occupancy(1, "shared", 8), multiplies=True,
)  # fmt: skip

SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   HMMA.16816.F32.BF16 R4, R4, R8, R12 ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R4, R8, R12 ;
        /*0030*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0040*/              @!P0 BRA 0x20 ;
        /*0050*/              @P1  BRA 0x70 ;
        /*0060*/                   HMMA.16816.F32.BF16 R4, R4, R8, R12 ;
        /*0070*/                   EXIT ;
        /*0080*/                   BRA 0x80;
"""
GCN = """
    v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
    s_cbranch_scc1 .LBB0_3
.LBB0_2:
    v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
    v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
    s_cbranch_scc0 .LBB0_2
.LBB0_3:
    s_endpgm
    .amdgpu_metadata
    .vgpr_count: 10
    .vgpr_spill_count: 0
    .sgpr_spill_count: 0
    .private_segment_fixed_size: 0
"""


def test_products_in_loops() -> None:
    """A backward branch makes a loop; a forward one and the branch to itself at the end do not."""
    assert (read_sass(SASS, 10, 0).mma, read_sass(SASS, 10, 0).loop_mma) == ((("mma", 3),), (("mma", 1),))
    assert (read_amdgcn(GCN).mma, read_amdgcn(GCN).loop_mma) == ((("mfma", 3),), (("mfma", 2),))


def test_a_good_kernel_passes() -> None:
    assert list(build_gates.offences([GOOD], build_gates.GATES)) == []


@pytest.mark.parametrize(
    "bad, gate, number",
    [
        (replace(GOOD, code=replace(CODE, spills=12)), "spills", "12 spills"),
        (
            replace(GOOD, code=replace(CODE, loop_mma=())),
            "no-tensor-cores",
            "0 tensor-core instructions in its loops, 8",
        ),
        (replace(GOOD, error="CompileError: too large"), "spills", "too large"),
        (replace(GOOD, fits=False, shared=300_000, shared_limit=232_448), "spills", "300000 of 232448"),
    ],
)
def test_offences(bad: Compiled, gate: str, number: str) -> None:
    """One line with kernel, target, configuration and number; none without a gate."""
    (line,) = build_gates.offences([bad, GOOD], [gate])
    assert all(part in line for part in ("attend_forward", "h200", "128x64", "warps 8 stages 3", number))
    assert list(build_gates.offences([bad], [])) == []


def test_a_kernel_without_products_needs_no_tensor_cores() -> None:
    plain = replace(GOOD, multiplies=False, code=replace(CODE, mma=(), loop_mma=()))
    assert list(build_gates.offences([plain], ["no-tensor-cores"])) == []


def test_an_offence_ends_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    bad = replace(GOOD, code=replace(CODE, spills=3))
    with pytest.raises(click.exceptions.Exit) as ended:
        measure._end_on_offences({Path("one.py"): [GOOD, bad]}, ["spills"])
    assert ended.value.exit_code == 1
    assert capsys.readouterr().err.splitlines() == [f"one.py: {build_gates.described(bad)}: 3 spills"]
    measure._end_on_offences({Path("one.py"): [GOOD, bad]}, ["no-tensor-cores"])


def test_the_report_says_why_a_kernel_spills() -> None:
    """128 rows of out and scores, 128 + 64 columns, in 256 threads: 96 registers."""
    dims = (("C.QK_DIM", "128"), ("C.V_DIM", "128"))
    spilled = replace(GOOD, constexprs=GOOD.constexprs + dims, code=replace(CODE, registers=255, spills=12))
    (line,) = reasons([GOOD, spilled])
    assert "12 spills: a thread can have 255 registers, 96 of them with sums and scores of its tile" in line
    (line,) = reasons([replace(spilled, code=replace(CODE, registers=168, spills=2))])
    assert "2 spills: the compiler keeps to 168 registers of the 255" in line


def test_the_report_says_why_no_tensor_core_is_in_a_loop() -> None:
    (line,) = reasons([replace(GOOD, code=replace(CODE, loop_mma=()))])
    assert "its 8 stand outside" in line
    (line,) = reasons([replace(GOOD, code=replace(CODE, mma=(), loop_mma=()))])
    assert "ordinary instructions" in line
