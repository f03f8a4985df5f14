"""How often a product is computed: from texts of Triton's GPU dialect, and from kernels of the patterns."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from unittest import mock

import click
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from rich.console import Console

from spdsl import targets
from spdsl.cli import measure
from spdsl.machine import build_gates, report
from spdsl.machine.crosscompile import compile_launch
from spdsl.machine.products import Product, products
from spdsl.machine.reasons import reasons
from spdsl.machine.survey import survey
from spdsl.runtime.launch import launch as launching
from spdsl.runtime.tuning.configs import Config
from spdsl.runtime.tuning.footprint import KernelShape
from spdsl.runtime.tuning.warps import product_repeats, without_repeats
from tests.crosscompile.kernels import load
from tests.machine.test_build_gates import GOOD

WGMMA = "nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [8, 1], instrShape = [16, 32, 16]}>"
SHARED = "nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [4, 2], instrShape = [16, 64, 16]}>"
ROWS = "nvidia_mma<{versionMajor = 2, versionMinor = 0, warpsPerCTA = [8, 1], instrShape = [16, 8]}>"
COLUMNS = "nvidia_mma<{versionMajor = 2, versionMinor = 0, warpsPerCTA = [1, 8], instrShape = [16, 8]}>"
BATCHED = "nvidia_mma<{versionMajor = 2, versionMinor = 0, warpsPerCTA = [1, 8, 1], instrShape = [1, 16, 8]}>"
MFMA = "amd_mfma<{version = 3, warpsPerCTA = [4, 1], instrShape = [32, 32, 8], isTransposed = true}>"
OLD_MFMA = (
    "amd_mfma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [4, 1], instrShape = [16, 16], isTransposed = true}>"
)
TILED = "amd_mfma<{version = 4, warpsPerCTA = [2, 2], tilesPerWarp = [2, 1], instrShape = [32, 32, 16]}>"
BLOCKED = "blocked<{sizePerThread = [1, 4], threadsPerWarp = [2, 16], warpsPerCTA = [4, 1], order = [1, 0]}>"
LINEAR = (
    "linear<{register = [[0, 1], [0, 2], [0, 4], [0, 8]], lane = [[1, 0], [2, 0], [4, 0], [8, 0], [0, 16]], "
    "warp = [[16, 0], [32, 0], %s], block = []}>"
)


def text(layout: str, shape: str, operation: str = "tt.dot %a, %b, %c", loop: str = "scf.for") -> str:
    return f"""#mma = #ttg.{layout}
#smem = #ttg.shared_memory
module attributes {{"ttg.num-warps" = 8 : i32}} {{
  tt.func public @kernel() {{
    %before = tt.dot %a, %b, %c : tensor<16x16xbf16, #x> * tensor<16x16xbf16, #y> -> tensor<16x16xf32, #mma> loc(#loc1)
    %out:2 = {loop} %i = %x to %y step %z iter_args(%c = %d) -> (i32, tensor<8x8xf32, #mma>)  : i32 {{
      %m = "tt.reduce"(%p) ({{
      ^bb0(%x1: f32, %x2: f32):
        tt.reduce.return %x1 : f32
      }}) : (tensor<{shape}xf32, #mma>) -> tensor<16xf32, #ttg.slice<{{dim = 1, parent = #mma}}>> loc(#loc2)
      %s = {operation} : tensor<64x64xbf16, #x> * tensor<64x64xbf16, #y> -> tensor<{shape}xf32, #mma> loc(#loc3)
      scf.yield %m, %s : i32, tensor<8x8xf32, #mma> loc(#loc3)
    }} loc(#loc3)
    %after = tt.dot %a, %b, %c : tensor<16x16xbf16, #x> * tensor<16x16xbf16, #y> -> tensor<16x16xf32, #mma> loc(#loc1)
    tt.return loc(#loc1)
  }} loc(#loc)
}} loc(#loc)
"""


@pytest.mark.parametrize(
    "layout, shape, reach, times",
    [
        (WGMMA, "64x64", (128, 32), 2),
        (WGMMA, "128x64", (128, 32), 1),
        (SHARED, "64x128", (64, 128), 1),
        (ROWS, "64x64", (128, 8), 2),
        (ROWS, "32x64", (128, 8), 4),
        (COLUMNS, "16x16", (16, 64), 4),
        (COLUMNS, "64x64", (16, 64), 1),
        (BATCHED, "2x64x64", (128, 8), 2),
        (MFMA, "64x32", (128, 32), 2),
        (MFMA, "128x64", (128, 32), 1),
        (OLD_MFMA, "16x64", (64, 16), 4),
        (TILED, "64x64", (128, 64), 2),
        (BLOCKED, "16x16", (8, 64), 4),
        (LINEAR % "[0, 32]", "64x64", (64, 64), 1),
        (LINEAR % "[0, 0]", "64x32", (64, 32), 2),
    ],
)
def test_times(layout: str, shape: str, reach: tuple[int, int], times: int) -> None:
    """The one product of the loop; those before and behind it run once and do not count."""
    rows, columns = (int(n) for n in shape.split("x")[-2:])
    assert products(text(layout, shape)) == (Product(rows, columns, reach, times, depth=64),)


@pytest.mark.parametrize("operation", ["ttng.warp_group_dot %a, %b, %c {isAsync = true}", "ttng.tmem_load %a"])
def test_other_products(operation: str) -> None:
    (found,) = products(text(WGMMA, "64x64", operation, "scf.while"))
    assert found.times == 2


def test_nothing_in_a_loop() -> None:
    assert products(text(WGMMA, "64x64", loop="scf.if")) == ()
    assert products("") == ()


TWICE = replace(GOOD, products=(Product(64, 128, (64, 128), 1), Product(64, 64, (128, 32), 2)))


def test_the_gate_refuses_it() -> None:
    (line,) = build_gates.offences([TWICE, GOOD], ["redundant"])
    assert line.endswith("a product of 64x64 is computed 2 times: its warps take 128x32 at once")
    assert list(build_gates.offences([TWICE], ["spills", "no-tensor-cores"])) == []
    (reason,) = reasons([GOOD, TWICE])
    assert "64x64 is computed 2 times" in reason


def test_the_command_ends_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(click.exceptions.Exit) as ended:
        measure._end_on_offences({Path("one.py"): [GOOD, TWICE]}, ["redundant"])
    assert ended.value.exit_code == 1
    assert "one.py: attend_forward" in capsys.readouterr().err
    measure._end_on_offences({Path("one.py"): [GOOD, TWICE]}, ["spills"])


def test_the_report_shows_it() -> None:
    out = io.StringIO()
    Console(file=out, width=400).print(report.report([GOOD, TWICE]))
    assert [word for line in out.getvalue().splitlines() for word in line.split() if word in ("1x", "2x")] == [
        "1x",
        "2x",
    ]
    assert '"computed": 2' in report.to_json([TWICE])


@pytest.mark.crosscompile
@pytest.mark.parametrize(
    "target, kernel, config, times",
    [
        ("sm_90", "dkdv", Config(64, 64, 8, 1), 2),
        ("sm_90", "dkdv", Config(64, 64, 4, 1), 1),
        ("sm_80", "dkdv", Config(32, 32, 8, 1), 2),
        ("sm_100", "dq", Config(64, 64, 8, 1), 1),
        ("gfx942", "decode", Config(16, 64, 4, 1), 4),
        ("gfx942", "forward", Config(64, 64, 4, 1), 2),
    ],
)
def test_compiled_kernels(target: str, kernel: str, config: Config, times: int) -> None:
    """The compiled kernel of a configuration, and what the rule of `warps` says of it."""
    module, gpu = load("causal"), targets.find(target)
    with mock.patch.multiple(launching, lookup=lambda *_: config, without_repeats=lambda kernel, config, gpu: config):
        launch = next(one for one in survey(module, target=gpu) if one.name == f"attend_{kernel}")
    shape = KernelShape(kernel, 64, 64, 2, group=4 if kernel == "decode" else 1)
    assert compile_launch(launch, gpu).computed == times == product_repeats(shape, config, target)
    assert product_repeats(shape, without_repeats(shape, config, target), target) == 1
