"""The GPU data files: complete, consistent, found by every usual spelling."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from spdsl import targets

ALL = ("a100", "b200", "h100", "h200", "l40s", "mi300x", "rtx4090")


def test_all_files_are_read() -> None:
    assert targets.names() == ALL


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("h100", "h100"),
        ("H200", "h200"),
        ("sm_90", "h100"),
        ("sm90a", "h100"),
        ("sm_80", "a100"),
        ("sm_89", "rtx4090"),
        ("RTX 4090", "rtx4090"),
        ("sm_100", "b200"),
        ("gfx942", "mi300x"),
        ("cuda:90", "h100"),
    ],
)
def test_aliases(spelling: str, name: str) -> None:
    assert targets.find(spelling).name == name


@pytest.mark.parametrize(("wrong", "meant"), [("h10", "h100"), ("mi300", "mi300x"), ("gfx940", "mi300x")])
def test_unknown_name_suggests(wrong: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown target '{wrong}': did you mean .*{meant}"):
        targets.find(wrong)


def test_unlike_anything_lists_all() -> None:
    with pytest.raises(ValueError, match="known are a100, b200, h100"):
        targets.find("zzzzzz")


@pytest.mark.parametrize("name", ALL)
def test_numbers_agree_with_each_other(name: str) -> None:
    gpu = targets.find(name)
    assert gpu.shared_per_block + gpu.shared_reserved <= gpu.shared_per_sm
    assert gpu.registers_per_sm % gpu.schedulers == 0
    assert gpu.warps_per_sm % gpu.schedulers == 0
    assert gpu.rate("bf16") >= gpu.rate("tf32") >= gpu.rate("fp32")
    assert 0.5e12 < gpu.bandwidth < 1e13
    assert str(gpu.arch) in gpu.architecture


@pytest.mark.parametrize("name", ALL)
def test_every_number_has_its_source(name: str) -> None:
    text = (Path(targets.__file__).parent / f"{name}.toml").read_text(encoding="utf-8")
    keys = ("sm_count", "memory", "bandwidth", "l2", "shared_per_", "registers_per_", "warps_per_sm", "blocks_per_sm")
    keys += ("clock", "exponentials")
    lines = [line for line in text.splitlines() if line.startswith(keys)]
    tables = [line for line in text.split("[rates]\n")[1].splitlines() if "=" in line]
    assert len(lines) == 12
    assert [line for line in lines + tables if "#" not in line] == []


def test_known_values() -> None:
    assert targets.find("h200").shared_per_block == 232_448
    assert targets.find("a100").shared_per_block == 166_912
    assert targets.find("l40s").shared_per_block == 101_376
    assert targets.find("mi300x").shared_per_block == 65_536


def test_missing_rate() -> None:
    with pytest.raises(ValueError, match="a100 has no matrix rate for fp8; it has fp64, fp32"):
        targets.find("a100").rate("fp8")


def test_no_heavy_imports() -> None:
    code = "import sys, spdsl.targets as t; t.find('h100'); print({'torch', 'triton'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", ALL)
def test_every_matrix_dtype_has_shapes(name: str) -> None:
    gpu = targets.find(name)
    shapes = dict(gpu.shapes)
    plain = {"fp32"} if gpu.backend == "cuda" else set()  # CUDA cores
    assert set(shapes) == {dtype for dtype, _ in gpu.rates} - plain
    depth = 16 if gpu.backend == "cuda" else 8
    assert any(shape.endswith((f"k{depth}", f"x{depth}")) for shape in shapes["bf16"])


@pytest.mark.parametrize(("name", "flops"), [("a100", 2048), ("h100", 4096), ("h200", 4096), ("b200", 8192)])
def test_the_clock_is_that_of_the_rates(name: str, flops: int) -> None:
    gpu = targets.find(name)
    assert gpu.clock * gpu.sm_count * flops == pytest.approx(gpu.rate("bf16"), rel=0.01)


def test_exponentials_are_sixteen_for_each_sm_and_clock() -> None:
    for name in ALL:
        gpu = targets.find(name)
        if gpu.backend == "cuda":
            assert gpu.exponentials == pytest.approx(16 * gpu.sm_count * gpu.clock, rel=0.01)
        else:
            assert gpu.exponentials == 0
