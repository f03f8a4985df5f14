"""Generated modules as real files: a diff shows a reviewer what a change of the compiler prints differently.

A golden says *changed*; that the text is right is checked beside it, on the golden file itself.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

import spdsl

ROOT = Path(__file__).parents[2]
PATTERNS = ("streaming_llm", "document")  # one of each loop form


def _golden(name: str) -> Path:
    return Path(__file__).parent / f"{name}.py"


@pytest.mark.parametrize("name", PATTERNS)
def test_the_text_is_the_golden_one(name: str, request: pytest.FixtureRequest) -> None:
    text = spdsl.compile(ROOT / "patterns" / f"{name}.spat").text
    if request.config.getoption("--update-golden", default=False):
        _golden(name).write_text(text, encoding="utf-8")
    same = text == _golden(name).read_text(encoding="utf-8")
    assert same, f"{name} prints another module; look at it with `pytest tests/golden --update-golden` and `git diff`"


def _loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"golden_{name}", _golden(name))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", PATTERNS)
def test_the_golden_module_means_its_pattern(name: str) -> None:
    module = _loaded(name)
    inputs = module.example_inputs(2, 83, heads=4, kv_heads=2, qk_dim=16, v_dim=24, dtype=torch.float64)
    out, lse = module.attention(**inputs, return_lse=True)
    wanted, wanted_lse = module.reference(**inputs, return_lse=True)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(lse, wanted_lse, rtol=0, atol=1e-10)
