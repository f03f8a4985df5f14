"""`spdsl cost`: numbers of the table and of the JSON, what is refused, and the warning at a declared length."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from spdsl.checks.dense import slower_than_dense
from spdsl.checks.view import View
from spdsl.cli import main
from spdsl.cost.efficiency import KINDS, borrowed, efficiency
from spdsl.cost.estimate import curve, doubling
from spdsl.cost.phases import Stage
from spdsl.diagnostics import Source
from spdsl.ir.pattern import Expected
from spdsl.passes.count import Shape
from spdsl.resources import folder
from spdsl.targets import find, names
from tests.cost.plans import plan

WINDOW = str(folder("patterns") / "sliding_window.spat")


def cost(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["cost", *arguments])


def crossover(window: int) -> int:
    found = curve(plan("sliding_window", window=window), Stage.FORWARD, doubling(1024, 1 << 20), Shape(), find("h100"))
    (only,) = found.crossings
    assert only.wins
    return only.length


def test_the_crossover_moves_with_the_window() -> None:
    places = [crossover(window) for window in (1024, 4096, 16384)]
    assert places == sorted(places)
    assert places[0] < places[2] / 4


def test_a_tiny_window_wins_by_far() -> None:
    found = curve(plan("sliding_window", window=16), Stage.FORWARD, [1 << 20], Shape(), find("h200"))
    assert found.points[0].ratio > 100


def test_json_has_every_kernel_and_source() -> None:
    done = cost(
        WINDOW, "--target", "h200", "--length", "4k..16k", "--format", "json", "--heads", "4", "--kv-heads", "4"
    )
    assert done.exit_code == 0, done.output
    (document,) = json.loads(done.output)
    assert [one["phase"] for one in document["curves"]] == ["forward", "backward", "prefill", "decode"]
    assert [one["length"] for one in document["curves"][0]["points"]] == [4096, 8192, 16384]
    point = document["curves"][0]["points"][0]
    assert point["seconds"] == pytest.approx(sum(one["seconds"] for one in point["kernels"]))
    assert document["curves"][0]["shape"]["heads"] == 4
    assert set(document["efficiencies"]["h200"]) == set(KINDS)


def test_formulas_are_printed() -> None:
    done = cost(WINDOW, "-D", "window=100", "--formulas", "--phase", "forward", "--heads", "1", "--kv-heads", "1")
    assert "FLOPs = B*(51200*N - 2534400)" in done.output  # 512 for each of 100 N - 4950 pairs


def test_formulas_of_a_parameter_are_printed() -> None:
    """Every query sees `window` keys but the first ones: N w - w (w - 1) / 2 pairs of 512 FLOPs."""
    words = (
        "-D",
        "window=100",
        "--formulas",
        "--of",
        "window",
        "--phase",
        "forward",
        "--heads",
        "1",
        "--kv-heads",
        "1",
    )
    done = cost(WINDOW, *words)
    assert "FLOPs = B*(512*N*window - 256*window**2 + 256*window)" in done.output, done.output
    assert "window: 100, 101, 102, ... < N / 4" in done.output
    assert "no parameter `wndow`; did you mean `window`?" in cost(WINDOW, "--formulas", "--of", "wndow").output
    assert cost(WINDOW, "--of", "window").exit_code == 2


@pytest.mark.parametrize("wrong", [("--length", "0"), ("--length", "8k..4k"), ("--target", "h1000"), ("--length", "x")])
def test_wrong_arguments_are_refused(wrong: tuple[str, str]) -> None:
    assert cost(WINDOW, *wrong).exit_code == 2


def test_a_plot_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = cost(WINDOW, "--length", "4k..16k", "--plot", str(tmp_path / "a" / "cost.png"))
    assert done.exit_code == 0, done.output
    assert (tmp_path / "a" / "cost.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_torch_is_not_imported() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from spdsl.cli import main; "
        f"assert CliRunner().invoke(main, ['cost', {WINDOW!r}, '--length', '4k']).exit_code == 0; "
        "print({'torch', 'triton'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", names())
def test_every_efficiency_has_a_source_or_says_whose_it_is(name: str) -> None:
    missing = {kind for kinds in borrowed(name).values() for kind in kinds}
    for kind in KINDS:
        found = efficiency(name, kind)
        assert 0 < found.value < 1
        assert len(found.source) > 10
        assert (found.gpu == name) == (kind not in missing)


def test_slower_than_dense_is_told_at_the_declared_length_only() -> None:
    found = plan("nsa")
    shape = Shape(1, 64, 4, 192, 128)
    source = Source("pattern nsa {}")

    def codes(length: int | None) -> list[str]:
        view = View(found, source, find("h200"), Expected(length), shape)
        return [one.code for one in slower_than_dense(view)]

    assert codes(2048) == ["W510"]
    assert codes(None) == []
