"""`spdsl compile --standalone`: a package that works where spdsl is not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from spdsl.cli import main
from spdsl.codegen.standalone import library_texts
from spdsl.resources import folder

SELECTED = """pattern selected {
    causal
    entries = compress(8, 4)
    coarse = attend(entries)
    chosen = top_k(2, score = mass(coarse), share = group, unit = 16, force = last(1))
    return gate(coarse, attend(chosen), attend(sliding(9)))
}
"""
ALONE = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "spdsl":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
import torch
import NAME as m
"""
CALLS = """
given = m.example_inputs(2, 40, heads=4, kv_heads=2, qk_dim=16, v_dim=16)
learned = [x.requires_grad_() for x in given.values() if x.is_floating_point()]
out, exact = m.attention(**given), m.reference(**given)
torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
grads, wanted = (torch.autograd.grad(x.square().sum(), learned) for x in (out, exact))
for a, b in zip(grads, wanted):
    torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-3, atol=1e-4)
with torch.no_grad():
    cache = m.Cache(2, 64, kv_heads=2, qk_dim=16, v_dim=16, page=16)
    first = m.prefill(**{name: x[:, :, :39] for name, x in given.items()}, cache=cache)
    last = m.decode(**{name: x[:, :, 39:] for name, x in given.items()}, cache=cache)
torch.testing.assert_close(torch.cat((first, last), 2), out, rtol=1e-5, atol=1e-5)
print("same")
"""
TUNED = """
rt, tuner = m.rt, m.MODULE.tuner
given = m.example_inputs(1, 200, dtype=torch.bfloat16)
with tuner.asking() as asked, rt.launching(lambda *args, **named: None):
    m.attention(**given)
(bucket, default), *_ = [(x, found) for x, found in asked.items() if x.kernel == "forward"]
key = rt.bucket_key(bucket)
print(tuner.known().get(key))
rt.write_winners(tuner.store_for(None), {key: rt.Winner(default, 1.0, 2.0, 3, "a GPU")})
print(tuner.store_for(None).path)
"""


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["compile", *map(str, arguments)])
    return done.exit_code, done.output


def alone(code: str, name: str, where: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    environment["SPDSL_CACHE_DIR"] = str(where / "cache")
    line = [sys.executable, "-c", ALONE.replace("NAME", name) + code]
    done = subprocess.run(line, capture_output=True, text=True, cwd=where, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_phase_without_spdsl(tmp_path: Path) -> None:
    (tmp_path / "selected.spat").write_text(SELECTED)
    code, output = run(tmp_path / "selected.spat", folder("patterns") / "causal.spat", "--standalone", tmp_path)
    assert (code, output) == (0, f"{tmp_path}/selected/__init__.py\n{tmp_path}/causal/__init__.py\n")
    for name in ("selected", "causal"):
        assert alone(CALLS, name, tmp_path) == "same\n"


def test_inside_another_package(tmp_path: Path) -> None:
    """It imports nothing by an absolute name, so it may lie anywhere."""
    assert run(folder("patterns") / "causal.spat", "--standalone", tmp_path / "mine")[0] == 0
    (tmp_path / "mine" / "__init__.py").write_text("")
    assert alone(CALLS, "mine.causal", tmp_path) == "same\n"


def test_a_part_of_the_library(tmp_path: Path) -> None:
    """Files of the library as they are, but for their imports; those of other patterns are left out."""
    run(folder("patterns") / "causal.spat", "--standalone", tmp_path)
    runtime = tmp_path / "causal" / "runtime"
    found = {path.relative_to(runtime).as_posix() for path in runtime.rglob("*.py")}
    assert found < set(library_texts())
    assert "units/pairs.py" not in found
    for name in found - {"rt.py"}:
        kept = [
            line for line in (runtime / name).read_text().split("\n") if not line.startswith(("from .", "    from ."))
        ]
        own = library_texts()[name].split("\n")
        assert kept == [line for line in own if not line.strip().startswith("from spdsl.runtime")]


def test_what_is_tuned_is_kept(tmp_path: Path) -> None:
    run(folder("patterns") / "causal.spat", "--standalone", tmp_path)
    first, path = alone(TUNED, "causal", tmp_path).splitlines()
    assert first == "None"
    assert Path(path).is_file()
    again, _ = alone(TUNED, "causal", tmp_path).splitlines()
    assert again.startswith("Winner(config=Config(")


def test_a_foreign_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "causal").mkdir()
    (tmp_path / "causal" / "__init__.py").write_text("mine = 1\n")
    code, output = run(folder("patterns") / "causal.spat", "--standalone", tmp_path)
    assert code == 2
    assert "was not made by spdsl; --force overwrites it" in output
    assert (tmp_path / "causal" / "__init__.py").read_text() == "mine = 1\n"
    assert run(folder("patterns") / "causal.spat", "--standalone", tmp_path, "--force")[0] == 0


def test_files_of_an_older_library_go(tmp_path: Path) -> None:
    run(folder("patterns") / "causal.spat", "--standalone", tmp_path)
    (tmp_path / "causal" / "runtime" / "tiles" / "gone.py").write_text("")
    assert run(folder("patterns") / "causal.spat", "--standalone", tmp_path)[0] == 0
    assert not (tmp_path / "causal" / "runtime" / "tiles" / "gone.py").exists()


@pytest.mark.crosscompile
def test_its_kernels_are_those_of_the_module(tmp_path: Path) -> None:
    """Recording, cross-compiling and the table of kernels go by the library of the package."""
    from spdsl import targets
    from spdsl.machine.module_report import compile_file

    source = folder("patterns") / "causal.spat"
    run(source, "--standalone", tmp_path)
    run(source, "-o", tmp_path)
    paths = (tmp_path / "causal" / "__init__.py", tmp_path / "causal.py")
    mine, whole = ([(x.kernel, x.registers, x.shared) for x in compile_file(p, [targets.find("h100")])] for p in paths)
    assert mine == whole
    assert len(mine) > 5
