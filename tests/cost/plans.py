"""Plans and modules of the tests of the cost model."""

from __future__ import annotations

import importlib.util
import sys
from fractions import Fraction
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from types import ModuleType

from spdsl.compiler import compile as compile_pattern
from spdsl.compiler import plan_of
from spdsl.diagnostics import Source
from spdsl.ir.plan import Plan
from spdsl.resources import folder

STATIC = ("causal", "alibi", "sliding_window", "sink_attention", "streaming_llm", "dilated", "sparse_transformer")
CHOSEN = ("nsa", "infllm_v2", "moba", "msa_minimax")
SMALL: dict[str, dict[str, int]] = {
    "nsa": {"width": 8, "stride": 4, "block": 16, "count": 4, "window": 10},
    "moba": {"block": 16, "count": 3},
    "infllm_v2": {"block": 32, "count": 2, "local": 2},
    "msa_minimax": {"block": 16, "count": 3},
    "streaming_llm": {"sinks": 3, "window": 20},
    "sliding_window": {"window": 24},
    "sparse_transformer": {"stride": 6},
    "dilated": {"window": 9, "step": 3},
    "sink_attention": {"window": 12},
}


def text_of(name: str) -> str:
    return (folder("patterns") / f"{name}.spat").read_text()


@cache
def plan(name: str, small: bool = False, **params: int) -> Plan:
    own = {**(SMALL.get(name, {}) if small else {}), **params}
    return plan_of(Source(text_of(name)), None, {key: Fraction(value) for key, value in own.items()})


@cache
def plan_of_text(text: str) -> Plan:
    return plan_of(Source(text), None, {})


@cache
def module_of(text: str, **params: int) -> ModuleType:
    made = compile_pattern(Source(text), None, {key: Fraction(value) for key, value in params.items()})
    path = Path(mkdtemp()) / f"cost_{made.digest[:12]}.py"
    path.write_text(made.text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
