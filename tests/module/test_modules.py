"""Generated modules as files: what they import, and several of them in one process."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import spdsl
from spdsl.cli.output import write_package
from spdsl.codegen.standalone import standalone
from spdsl.runtime.version import RUNTIME
from tests.module.patterns import PATTERNS, arguments, gradients, module_of

ALLOWED = {*sys.stdlib_module_names, "torch", "spdsl"}
HEAVY = {"lark", "sympy", "jinja2", "click", "rich", "ruff"}


def run(code: str, *words: str, folder: Path) -> str:
    """A fresh interpreter in `folder`; -> what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    line = [sys.executable, "-c", code, *words]
    done = subprocess.run(line, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(PATTERNS.glob("*.spat")), ids=lambda path: path.stem)
def test_a_module_imports_torch_and_the_library(path: Path) -> None:
    tree = ast.parse(spdsl.compile(path).text)
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= ALLOWED


def test_importing_a_module_loads_nothing_of_the_compiler(tmp_path: Path) -> None:
    for name in ("causal", "nsa"):
        (tmp_path / f"{name}.py").write_text(spdsl.compile(PATTERNS / f"{name}.spat").text)
    loaded = (
        "{name.split('.')[0] for name in sys.modules} | {name for name in sys.modules if name.startswith('spdsl.')}"
    )
    code = f"import sys, torch; import causal, nsa; print(*sorted({loaded}))"
    found = set(run(code, folder=tmp_path).split())
    assert found & HEAVY == set()
    parts = {name.split(".")[1] for name in found if name.startswith("spdsl.")}
    assert parts <= {"runtime", "version"}


def test_a_module_for_another_library_says_so(tmp_path: Path) -> None:
    text = spdsl.compile(PATTERNS / "causal.spat").text
    (tmp_path / "older.py").write_text(text.replace(f"runtime={RUNTIME}", "runtime=0"))
    with pytest.raises(ImportError, match=rf"causal was made for runtime 0, this is {RUNTIME}: run `spdsl compile`"):
        imported(tmp_path / "older.py", "older")


def test_lines() -> None:
    """Modules are short enough to be read."""
    lines = {path.stem: spdsl.compile(path).text.count("\n") for path in PATTERNS.glob("*.spat")}
    assert {name: count for name, count in lines.items() if count > MOST_LINES[name]} == {}
    assert lines["causal"] < 700
    assert lines["nsa"] < 2200


MOST_LINES = {
    "alibi": 960, "big_bird": 850, "blasst": 930, "block_sparse": 820, "causal": 699, "dilated": 1090, "document": 810,
    "infllm_v2": 2350, "longformer": 1490, "moba": 980, "msa_minimax": 1240, "nsa": 2199, "prefix_lm": 810,
    "seer_attention": 1160, "sink_attention": 750, "sliding_window": 720, "sparse_transformer": 740,
    "streaming_llm": 760, "vsa": 1310, "xattention": 1285,
}  # fmt: skip

WITHOUT_TRITON = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

import torch
sys.meta_path.insert(0, Refuse())
for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
    del sys.modules[name]
import streaming_llm as m
x = m.example_inputs(2, 40, qk_dim=16, v_dim=16)
q = x.pop("q").requires_grad_()
out = m.attention(q, **x)
out.sum().backward()
torch.testing.assert_close(out.double(), m.reference(q, **x), rtol=1e-5, atol=1e-5)
cache = m.Cache(2, 64, kv_heads=2, qk_dim=16, v_dim=16)
first = m.prefill(*(y[:, :, :39] for y in (q, x["k"], x["v"])), cache)
last = m.decode(*(y[:, :, 39:] for y in (q, x["k"], x["v"])), cache)
torch.testing.assert_close(torch.cat((first, last), 2), out, rtol=1e-5, atol=1e-5)
assert not [name for name in sys.modules if name.split(".")[0] in REFUSED]
print("same")
"""


def test_the_cpu_path_needs_no_triton(tmp_path: Path) -> None:
    (tmp_path / "streaming_llm.py").write_text(spdsl.compile(PATTERNS / "streaming_llm.spat", window=9).text)
    assert run("REFUSED = ('triton',)" + WITHOUT_TRITON, folder=tmp_path) == "same\n"


def test_nor_does_a_standalone_package_need_spdsl(tmp_path: Path) -> None:
    files = standalone(spdsl.compile(PATTERNS / "streaming_llm.spat", window=9).text)
    write_package(tmp_path, "streaming_llm", files)
    assert run("REFUSED = ('triton', 'spdsl')" + WITHOUT_TRITON, folder=tmp_path) == "same\n"


def test_importing_spdsl_is_light() -> None:
    heavy = "{'torch', 'triton', 'sympy', 'lark', 'jinja2', 'numpy'}"
    code = f"import sys, spdsl; print({heavy} & {{name.split('.')[0] for name in sys.modules}})"
    assert run(code, folder=PATTERNS.parent) == "set()\n"


def test_two_parameters_of_one_pattern_side_by_side() -> None:
    narrow, wide = (spdsl.load(PATTERNS / "sliding_window.spat", window=window) for window in (3, 11))
    assert narrow.MODULE.namespace != wide.MODULE.namespace
    assert (narrow.PARAMS, wide.PARAMS) == ({"window": 3}, {"window": 11})
    given = arguments(narrow)
    for module in (narrow, wide, narrow):
        exact = module.reference(**given)
        torch.testing.assert_close(module.attention(**given), exact.float(), rtol=1e-5, atol=1e-5)
    assert not torch.equal(*(gradients(module, given)["k"] for module in (narrow, wide)))


def test_one_name_from_two_files(tmp_path: Path) -> None:
    (tmp_path / "a.spat").write_text("pattern mine { causal return attend(sliding(4)) }")
    (tmp_path / "b.spat").write_text("pattern mine { causal return attend(sink(2) | sliding(4)) }")
    one, two = (spdsl.load(tmp_path / name) for name in ("a.spat", "b.spat"))
    assert one is not two
    given = arguments(one)
    for module in (one, two):
        torch.testing.assert_close(module.attention(**given), module.reference(**given).float(), rtol=1e-5, atol=1e-5)
    assert spdsl.load(tmp_path / "a.spat") is one


def test_one_module_imported_under_two_names(tmp_path: Path) -> None:
    """As when a project carries the file and a library loads the pattern: the operators have the same names."""
    path = tmp_path / "carried.py"
    path.write_text(spdsl.compile(PATTERNS / "streaming_llm.spat", window=9, sinks=2).text)
    loaded, carried = module_of("streaming_llm"), imported(path, "carried")
    given = arguments(loaded)
    for module in (loaded, carried):
        torch.testing.assert_close(module.attention(**given), module.reference(**given).float(), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(x, gradients(carried, given)[name]) for name, x in gradients(loaded, given).items())


@pytest.mark.parametrize("page", [16, 64, None])
def test_generation_equals_attention(streaming: ModuleType, page: int | None) -> None:
    """A prompt in two pieces, then one token at a time; nothing asks for a gradient."""
    given = arguments(streaming, 40)
    whole = streaming.attention(**given)
    cache = streaming.Cache(2, 48, kv_heads=2, qk_dim=16, v_dim=24, page=page)
    given["q"].requires_grad_()
    steps = [(0, 17), (17, 35), *((n, n + 1) for n in range(35, 40))]
    parts = []
    for first, end in steps:
        step = streaming.decode if end - first == 1 else streaming.prefill
        parts.append(step(*(x[:, :, first:end] for x in given.values()), cache))
    assert not any(part.requires_grad for part in parts)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-5, atol=1e-5)
    assert cache.lengths.tolist() == [40, 40]


def test_generation_under_autocast(streaming: ModuleType) -> None:
    given = arguments(streaming, 20)
    cache = streaming.Cache(2, 48, kv_heads=2, qk_dim=16, v_dim=24, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = streaming.attention(**given)
        out = streaming.prefill(**given, cache=cache)
    torch.testing.assert_close(out, wanted, rtol=2e-2, atol=2e-2)


def test_a_phase_without_a_result_says_so() -> None:
    module = spdsl.load("pattern only { causal return attend(sliding(4)) if train }")
    assert not hasattr(module, "decode")
    with pytest.raises(AttributeError, match="only has no `decode`: no `return` of the pattern covers that phase"):
        module.decode()
    with pytest.raises(AttributeError, match="no attribute 'decoder'"):
        module.decoder()
