"""The command `spdsl` with the real compiler behind it: files, stages, exit codes, pictures, bad sources."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PATTERNS = Path(__file__).resolve().parents[1] / "patterns"
TWO = """
pattern near { param window = 4 causal return attend(sliding(window)) }
pattern whole { return attend(all) }
"""
ANSWERS_WITHIN = 1.0  # processor seconds for a source that is refused, besides starting and importing

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def spdsl(tmp_path: Path) -> Command:
    """Runs the command in a process of its own, in an empty folder."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = str(PATTERNS.parent)
        line = [sys.executable, "-m", "spdsl.cli", *words]
        return subprocess.run(
            line, capture_output=True, text=True, encoding="utf-8", cwd=tmp_path, env=environment, check=False
        )

    return run


def of_children() -> float:
    """Processor seconds of the processes that were waited for."""
    return os.times().children_user + os.times().children_system


@pytest.fixture(scope="module")
def starting() -> float:
    """Processor seconds for starting and importing: 0.7, and twice that where cores are shared."""
    begun = of_children()
    subprocess.run([sys.executable, "-c", "import spdsl.cli, spdsl.compiler"], cwd=PATTERNS.parent, check=True)
    return of_children() - begun


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_compile_writes_every_pattern(spdsl: Command, tmp_path: Path) -> None:
    (tmp_path / "two.spat").write_text(TWO)
    done = spdsl("compile", "two.spat", "-o", "made", "-D", "window=9")
    assert (done.returncode, done.stdout) == (0, "made/near.py\nmade/whole.py\n"), done
    assert "PARAMS = {'window': 9}" in (tmp_path / "made/near.py").read_text().replace('"', "'")
    done = spdsl("compile", "two.spat", "-o", "made")
    assert (done.returncode, done.stdout) == (0, "made/near.py\nmade/whole.py\n"), done.stderr
    done = spdsl("compile", "two.spat", "-o", "made", "-D", "widow=9")
    assert (done.returncode, done.stdout) == (1, ""), done
    assert "did you mean `window`?" in done.stderr, "neither has it"
    done = spdsl("compile", "two.spat", "-o", "made", "-p", "near", "-D", "window=9")
    assert done.returncode == 0, done.stderr
    assert "PARAMS = {'window': 9}" in (tmp_path / "made/near.py").read_text().replace('"', "'")
    assert files(tmp_path) == ["made/near.py", "made/whole.py", "two.spat"]


def test_compile_keeps_what_it_did_not_make(spdsl: Command, tmp_path: Path) -> None:
    (tmp_path / "causal.py").write_text("mine = 1\n")
    done = spdsl("compile", str(PATTERNS / "causal.spat"))
    assert done.returncode == 2
    assert "--force overwrites it" in done.stderr
    assert (tmp_path / "causal.py").read_text() == "mine = 1\n"


@pytest.mark.parametrize("stage", ["pattern", "aligned", "plan"])
def test_emit_prints_a_stage(spdsl: Command, tmp_path: Path, stage: str) -> None:
    done = spdsl("compile", str(PATTERNS / "streaming_llm.spat"), "-D", "window=77", "--emit", stage)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\b7[67]\b", done.stdout), "the window"
    assert files(tmp_path) == []


def test_emit_prints_the_tree(spdsl: Command) -> None:
    done = spdsl("compile", str(PATTERNS / "streaming_llm.spat"), "--emit", "tree")
    assert (done.returncode, done.stdout.count("text=window")) == (0, 2), "declared, and used"


def test_emit_prints_the_steps(spdsl: Command, tmp_path: Path) -> None:
    done = spdsl("compile", str(PATTERNS / "nsa.spat"), "--emit", "steps")
    assert done.returncode == 0, done.stderr
    heads = [line for line in done.stdout.splitlines() if line in ("forward", "backward", "prefill", "decode")]
    assert heads == ["forward", "backward", "prefill", "decode"]
    assert "    merge_ranks: a list, over the ranks of its programs" in done.stdout
    assert files(tmp_path) == []


def test_emit_prints_the_module(spdsl: Command, tmp_path: Path) -> None:
    done = spdsl("compile", str(PATTERNS / "streaming_llm.spat"), "--emit", "module")
    assert done.returncode == 0, done.stderr
    names = {node.name for node in ast.parse(done.stdout).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert {"attention", "prefill", "decode", "reference", "Cache"} <= names
    assert files(tmp_path) == []


def test_standalone_writes_a_package(spdsl: Command, tmp_path: Path) -> None:
    line = ("compile", str(PATTERNS / "causal.spat"), "--standalone", "packages")
    for again in (False, True):
        done = spdsl(*line)
        assert (done.returncode, done.stdout.strip()) == (0, "packages/causal/__init__.py"), done.stderr
        texts = [path.read_text(encoding="utf-8") for path in (tmp_path / "packages" / "causal").rglob("*.py")]
        assert not any(re.search(r"^ *(from|import) spdsl", text, re.MULTILINE) for text in texts), again
    (tmp_path / "packages" / "causal" / "__init__.py").write_text("mine = 1\n")
    done = spdsl(*line)
    assert (done.returncode, "was not made by spdsl" in done.stderr) == (2, True)
    assert (tmp_path / "packages" / "causal" / "__init__.py").read_text() == "mine = 1\n"


def test_check_tells_by_its_exit_code(spdsl: Command, tmp_path: Path) -> None:
    good = [str(path) for path in sorted(PATTERNS.glob("*.spat"))]
    done = spdsl("check", *good)
    assert (done.returncode, done.stderr) == (0, "no errors, no warnings\n"), done
    (tmp_path / "bad.spat").write_text("pattern p {\n    causal\n    return attend(slidding(4) | sink(3))\n}\n")
    done = spdsl("check", good[0], "bad.spat")
    assert done.returncode == 1
    assert "bad.spat:3:" in done.stderr
    assert "sliding" in done.stderr, "no suggestion"
    assert spdsl("check", "missing.spat").returncode == 2
    assert spdsl("check").returncode == 2


def test_check_as_json(spdsl: Command, tmp_path: Path) -> None:
    (tmp_path / "bad.spat").write_text("pattern p { return attend(slidding(4) | sinc(3)) }\n")
    done = spdsl("check", "bad.spat", "--format", "json")
    found = json.loads(done.stdout)
    assert done.returncode == 1
    assert len(found) == 2, "both errors in one run"
    assert all(one["code"].startswith("E") for one in found)


def test_show_in_the_terminal_and_as_a_picture(spdsl: Command, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    source = str(PATTERNS / "streaming_llm.spat")
    done = spdsl("show", source, "-D", "window=8", "--length", "64")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 8
    done = spdsl("show", source, "-D", "window=8", "--length", "64", "-o", "mask.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.crosscompile
def test_report_of_compiled_kernels(spdsl: Command, tmp_path: Path) -> None:
    (tmp_path / "whole.spat").write_text("pattern whole { dim qk = 128, v = 128 causal return attend(all) }")
    done = spdsl("compile", "whole.spat", "-o", "made", "--report", "--target", "h200")
    assert done.returncode == 0, done.stderr
    assert "attend_forward" in done.stdout
    assert "wgmma" in done.stdout
    assert re.search(r"8,192 .* 8,192 .* attend 8,192 .* 100.0%", done.stdout), "keys of a decode step"
    assert f"{2 * 8 * (8192 * 8193 // 2) * 2 * 128:,}" in done.stdout, "FLOPs of a forward pass"


BAD = {
    "empty": b"",
    "comment": b"# nothing\n",
    "binary": bytes(range(256)) * 40,
    "not utf-8": b"pattern p { return attend(\xff\xfe) }",
    "a megabyte": b"pattern p { return attend(all) }\n" * 32768,
    "nested": b"pattern p { return attend(" + b"(" * 10_000 + b"all" + b")" * 10_000 + b") }",
    "chained": b"pattern p { return attend(" + b"~" * 10_000 + b"all) }",
    "a long chain": b"pattern p { return attend(" + b" | ".join([b"sink(4)"] * 9_000) + b") }",
    "huge number": b"pattern p { return attend(sink(1" + b"0" * 400 + b")) }",
    "power": b"pattern p { param n = 10 ** 400 return attend(sink(n)) }",
    "unknown words": b"pattern p { return attention(widow(4)) }",
    "duplicates": b"pattern p { a = sink(4) a = sink(5) return attend(a) } pattern p { return attend(all) }",
    "keyword": b"pattern class { return attend(all) }",
    "import": b"pattern p { return attend(__import__(4)) }",
    "template": b"pattern p { return attend({{ 7 * 7 }}) }",
    "string": b'pattern p { return attend("{{ 7 }}") }',
    "nul": b"pattern p { return attend(all) }\x00",
    "bidi": "pattern p { return attend(all) } # \u202e".encode(),
    "nothing visible": b"pattern p { causal return attend(where(k > q)) }",
    "unclosed": b"pattern p { return attend(all)",
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_source_is_refused_at_once(spdsl: Command, tmp_path: Path, name: str, starting: float) -> None:
    (tmp_path / "bad.spat").write_bytes(BAD[name])
    begun = of_children()
    done = spdsl("compile", "bad.spat", "-o", "made")
    seconds = of_children() - begun
    assert done.returncode == 1, done
    assert "error[E" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert files(tmp_path) == ["bad.spat"]
    assert not (tmp_path / "made").exists()
    assert seconds < starting + ANSWERS_WITHIN
