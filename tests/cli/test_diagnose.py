"""`spdsl diagnose` as it is called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from spdsl.cli import main

PATTERNS = Path(__file__).parents[2] / "patterns"


@pytest.fixture
def file(tmp_path: Path) -> str:
    torch.manual_seed(0)
    path = tmp_path / "one.safetensors"
    save_file({"q": torch.randn(1, 4, 64, 8), "k": torch.randn(1, 2, 64, 8), "v": torch.randn(1, 2, 64, 8)}, path)
    return str(path)


@pytest.fixture
def layers(tmp_path: Path) -> str:
    torch.manual_seed(0)
    path = tmp_path / "two.safetensors"
    sizes = {"q": 4, "k": 2, "v": 2}
    save_file({f"layers.{i}.{name}": torch.randn(1, h, 64, 8) for i in (0, 7) for name, h in sizes.items()}, path)
    return str(path)


def ran(*arguments: str, code: int = 0) -> str:
    done = CliRunner(env={"COLUMNS": "80"}).invoke(main, ["diagnose", *arguments])
    assert done.exit_code == code, done.output
    return done.output


def pattern(name: str) -> str:
    return str(PATTERNS / f"{name}.spat")


def test_a_row_for_each_head_in_80_columns(file: str):
    text = ran(pattern("moba"), "-D", "block=8", "-D", "count=2", "--data", file)
    assert all(len(line) <= 80 for line in text.splitlines())
    rows = [line for line in text.splitlines() if line.startswith("│ layer 0 ")]
    assert len(rows) == 4
    found = json.loads(ran(pattern("moba"), "-D", "block=8", "-D", "count=2", "--data", file, "--format", "json"))
    for row, one in zip(rows, found["heads"], strict=True):
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        assert cells[1] == str(one["head"])
        shares = [one[name] for name in ("kept", "missed", "missed_by_group")]
        assert cells[2:5] == [f"{100 * share:.1f}%" for share in shares]
        assert cells[8] == "/".join(f"{100 * share:.0f}" for share in one["overlap"])


def test_a_row_for_each_layer(layers: str):
    text = ran(pattern("streaming_llm"), "-D", "window=12", "--data", layers)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "64 queries, 64 keys, 2 layers" in text
    first = [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")]
    assert first == ["0", "7", "all"]
    found = json.loads(ran(pattern("streaming_llm"), "-D", "window=12", "--data", layers, "--format", "json"))
    assert found["params"] == {"sinks": "4", "window": "12"}
    assert (found["phase"], found["critical"], found["steps"]) == ("prefill", 0.9, [1, 4, 16])
    kept = [one["kept"] for one in found["heads"]]
    assert found["mean"]["kept"] == pytest.approx(sum(kept) / 8)
    assert {one["layer"] for one in found["heads"]} == {0, 7}


def test_weights_and_seed(file: str, tmp_path: Path):
    """A tensor of the second file is taken; what neither has depends on the seed alone."""
    source = tmp_path / "w.spat"
    source.write_text("pattern w { causal cells = compress(8, by = weighted) return attend(cells) }")
    names = [f"cells_{side}_{role}" for side in "kv" for role in ("weight", "position")]

    def told(*arguments: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(ran(str(source), "--data", file, "--format", "json", *arguments))
        return found

    assert [note.partition(":")[0] for note in told()["notes"]] == names
    assert told()["mean"] == told("--seed", "0")["mean"] != told("--seed", "5")["mean"]
    weights = tmp_path / "weights.safetensors"
    save_file({name: torch.ones(2, 8) if name.endswith("weight") else torch.ones(2, 8, 8) for name in names}, weights)
    given = told("--weights", str(weights), "--phase", "train")
    assert (given["notes"], given["phase"]) == ([], "train")
    assert given["mean"]["error"] != told()["mean"]["error"]


def test_rows_as_they_are_asked_for(layers: str, file: str):
    by_head = ran(pattern("causal"), "--data", layers, "--by", "head")
    assert len([line for line in by_head.splitlines() if line.startswith("│ layer ")]) == 8
    one = ran(pattern("causal"), "--data", layers, "--by", "head", "--layers", "7")
    assert len([line for line in one.splitlines() if line.startswith("│ layer 7 ")]) == 4
    by_layer = ran(pattern("causal"), "--data", file, "--by", "layer")
    assert "worst" in by_layer


def test_what_nobody_gives_is_told(file: str):
    text = ran(pattern("document"), "--data", file)
    assert "doc: an example, for the data has none" in text


def test_the_map_shows_where_mass_is_lost(file: str):
    """With a window of eight, queries lose the first keys, none of them the last eight."""
    text = ran(pattern("sliding_window"), "-D", "window=8", "--data", file)
    begin = text.index("queries down, keys across)") + len("queries down, keys across)\n")
    lines = text[begin:].splitlines()[:32]
    assert lines[:4] == [""] * 4
    widths = [len(line) for line in lines[4:]]
    assert widths == sorted(widths)
    assert widths[-1] <= 2 * (32 - 4)


def test_a_png(file: str, tmp_path: Path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "lost.png"
    text = ran(pattern("streaming_llm"), "-D", "window=9", "--data", file, "--output", str(path))
    assert text.splitlines()[-1] == path.as_posix()
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["causal", "-o", "x.jpg"], 2, "name it .png"),
        (["causal", "--layers", "3"], 2, "layers: the data holds 0, not 3"),
        (["causal", "--layers", "a"], 2, "is not of the form 0,1,12"),
        (["nsa"], 2, "k: expected 4 heads of dim 192, as nsa says, or k_rough, got [1, 2, 64, 8]"),
        (["causal", "-D", "window=3"], 1, "window"),
        (["causal", "-p", "other"], 2, "holds no pattern"),
    ],
)
def test_what_cannot_be_done(file: str, arguments: list[str], code: int, message: str):
    name, *others = arguments
    assert message in ran(pattern(name), "--data", file, *others, code=code)


def test_a_file_that_is_none(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    path.write_text("none")
    assert "no safetensors file" in ran(pattern("causal"), "--data", str(path), code=2)
