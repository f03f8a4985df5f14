"""`spdsl calibrate` as it is called, with the tiles that a skip would have."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import spdsl
from spdsl.calibration import Rule
from spdsl.cli import main

PATTERNS = Path(__file__).parents[2] / "patterns"


@pytest.fixture
def file(tmp_path: Path) -> str:
    torch.manual_seed(0)
    path = tmp_path / "qk.safetensors"
    save_file({"q": 2 * torch.randn(1, 2, 1024, 16), "k": torch.randn(1, 1, 1024, 16)}, path)
    return str(path)


@pytest.fixture
def skips(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the pattern left out tiles of 1 x 16."""
    import spdsl.calibration.counted  # noqa: F401

    monkeypatch.setattr(sys.modules["spdsl.calibration.counted"], "rule_of", lambda pattern, phase: Rule(1, 16))


def ran(*arguments: str, code: int = 0) -> str:
    done = CliRunner(env={"COLUMNS": "80"}).invoke(main, ["calibrate", str(PATTERNS / "causal.spat"), *arguments])
    assert done.exit_code == code, done.output
    return done.output


def told(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ran(*arguments, "--format", "json"))
    return found


def test_scales_reach_what_is_wanted(skips: None, file: str, tmp_path: Path) -> None:
    found = told("--data", file, "--sparsity", "0.3,0.5")
    assert list(found["most"]) == ["256", "512", "1024"]
    for row, wanted in zip(found["scales"], (0.3, 0.5), strict=True):
        assert row["sparsity"] == wanted
        assert all(abs(share - wanted) < 0.1 for share in row["reached"].values())
    text = ran("--data", file, "--sparsity", "0.3,0.5")
    assert all(len(line) <= 80 for line in text.splitlines())
    assert f"{found['scales'][0]['scale']:.6g}" in text
    pytest.importorskip("matplotlib")
    path = tmp_path / "curves.png"
    assert ran("--data", file, "--sparsity", "0.5", "-o", str(path)).splitlines()[-1] == path.as_posix()
    assert path.read_bytes().startswith(b"\x89PNG")


def test_phases_and_lengths(skips: None, file: str) -> None:
    assert list(told("--data", file, "--sparsity", "0.3", "--length", "512,1k")["most"]) == ["512", "1024"]
    decode = told("--data", file, "--sparsity", "0.3", "--phase", "decode")
    assert decode["phase"] == "decode"
    assert decode["b"] != told("--data", file, "--sparsity", "0.3")["b"]


def test_what_cannot_be_reached(skips: None, file: str) -> None:
    assert "0.99 cannot be reached: at 256 tokens" in ran("--data", file, "--sparsity", "0.99", code=2)


def test_what_cannot_be_done(skips: None, file: str, tmp_path: Path) -> None:
    assert "expected numbers between 0 and 1" in ran("--data", file, "--sparsity", "1.5", code=2)
    assert "is not of the form" in ran("--data", file, "--sparsity", "half", code=2)
    assert "the data have 1,024 keys" in ran("--data", file, "--sparsity", "0.5", "--length", "2k", code=2)
    assert "name it .png" in ran("--data", file, "--sparsity", "0.5", "--output", "x.jpg", code=2)
    path = tmp_path / "v.safetensors"
    save_file({"v": torch.ones(1, 1, 4, 4)}, path)
    assert "q: the data holds none, it holds v" in ran("--data", str(path), "--sparsity", "0.5", code=2)


def test_a_pattern_without_a_skip(file: str) -> None:
    assert "causal: no `attend(.., skip = below(..))` answers" in ran("--data", file, "--sparsity", "0.5", code=2)


SKIPS = """pattern skips {
    param scale = 1
    causal
    out = attend(all, skip = below(scale / length, rows = 16, unit = 16))
    return attend(all) if decode
    return out, kept(out)
}
"""


def test_the_module_leaves_out_what_is_told(tmp_path: Path) -> None:
    """Keys that grow shorter, so that whole tiles lie below: tiles counted by `kept` at the scale that comes out."""
    torch.manual_seed(0)
    q, k = 2 * torch.randn(1, 4, 256, 16), torch.randn(1, 2, 256, 16) * torch.linspace(3, 0.1, 256).view(-1, 1)
    save_file({"q": q, "k": k}, tmp_path / "qk.safetensors")
    (tmp_path / "skips.spat").write_text(SKIPS)
    given = ["calibrate", str(tmp_path / "skips.spat"), "--data", str(tmp_path / "qk.safetensors"), "--format", "json"]
    done = CliRunner().invoke(main, [*given, "--sparsity", "0.3", "--length", "256"])
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout)["scales"]
    module = spdsl.load(SKIPS, scale=float(f"{row['scale']:.9g}"))
    _, counts = module.attention(q, k, torch.randn(1, 2, 256, 16))
    kept, visible = counts.sum((0, 1, 2)).tolist()
    assert 1 - kept / visible == pytest.approx(row["reached"]["256"], abs=0.003)
    assert row["reached"]["256"] == pytest.approx(0.3, abs=0.1)
