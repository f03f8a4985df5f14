"""What `--emit steps` prints, as a file: a diff shows which launches a change adds, drops or moves."""

from __future__ import annotations

from pathlib import Path

import pytest

from spdsl.compiler import emit
from spdsl.diagnostics import Source

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["nsa", "infllm_v2"])
def test_the_steps_are_the_golden_ones(name: str, request: pytest.FixtureRequest) -> None:
    path = Path(__file__).parent / f"{name}.steps.txt"
    text = emit(Source((ROOT / "patterns" / f"{name}.spat").read_text(encoding="utf-8")), None, {}, "steps")
    if request.config.getoption("--update-golden"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")
