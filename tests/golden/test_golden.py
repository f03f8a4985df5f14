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
# Each form once: ranges, lists of tiles, a bias, classes of keys, two queries in one, units by pairs and by tiles,
# compression by a network, results by phase and by length; and two made for it: decode alone, a choice and a window.
SHIPPED = (
    "causal", "streaming_llm", "document", "alibi", "dilated", "longformer", "moba", "seer_attention", "infllm_v2",
    "nsa",
)  # fmt: skip
PATTERNS = (*SHIPPED, "last_step", "picked")


def _source(name: str) -> Path:
    folder = ROOT / "patterns" if name in SHIPPED else Path(__file__).parent / "patterns"
    return folder / f"{name}.spat"


def _golden(name: str) -> Path:
    return Path(__file__).parent / f"{name}.py"


@pytest.mark.parametrize("name", PATTERNS)
def test_the_text_is_the_golden_one(name: str, request: pytest.FixtureRequest) -> None:
    text = spdsl.compile(_source(name)).text
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
    declared = name in ("nsa", "infllm_v2")  # heads and dims of their own
    sizes = {} if declared else {"heads": 4, "kv_heads": 2, "qk_dim": 16, "v_dim": 24}
    inputs = module.example_inputs(1 if declared else 2, 83, **sizes, dtype=torch.float64)
    if name == "last_step":
        _check_steps(module, inputs, sizes)
        return
    found = module.attention(**inputs, return_lse=True)
    wanted = module.reference(**inputs, return_lse=True)
    if name == "seer_attention":  # the map beside it
        torch.testing.assert_close(found[1], wanted[1], rtol=0, atol=1e-10)
        found, wanted = found[0], wanted[0]
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10)


def _check_steps(module: ModuleType, inputs: dict[str, torch.Tensor], sizes: dict[str, int]) -> None:
    cache = module.Cache(2, 96, **{key: x for key, x in sizes.items() if key != "heads"}, dtype=torch.float64)
    steps = [module.decode(**{key: x[:, :, i : i + 1] for key, x in inputs.items()}, cache=cache) for i in range(83)]
    torch.testing.assert_close(torch.cat(steps, 2), module.reference(**inputs, phase="decode"), rtol=0, atol=1e-10)
