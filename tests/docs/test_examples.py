"""The Python examples of the documents that are whole programs run, and hold what they assert; so do the commands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from spdsl.cli import main
from tests.docs.test_docs import blocks

ROOT = Path(__file__).resolve().parents[2]


def programs(page: Path) -> list[str]:
    """The Python blocks of a page that import what they use."""
    found = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [text for text in found if text.startswith("import spdsl\nimport torch\n")]


README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
PROGRAMS = [pytest.param(page, text, id=f"{page.stem}-{i}") for page in PAGES for i, text in enumerate(programs(page))]


def commands() -> list[str]:
    """The lines of the README's ```sh blocks, which a reader runs in the folder of the patterns that it shows."""
    found = re.findall(r"^```sh\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [line for block in found for line in block.splitlines()]


def written(page: Path, folder: Path) -> None:
    """What a reader of the page has in front of him: the patterns that it shows, each in a file of its name."""
    for text in blocks(page):
        name = re.search(r"^pattern (\w+)", text, re.MULTILINE)
        assert name is not None
        (folder / f"{name[1]}.spat").write_text(text, encoding="utf-8")
    (folder / "patterns").symlink_to(ROOT / "patterns")


def test_there_are_programs_and_commands() -> None:
    assert {page for page, _ in (parameter.values for parameter in PROGRAMS)} >= {README, ROOT / "docs" / "module.md"}
    assert {line.split()[1] for line in commands()} >= {"check", "show"}


@pytest.mark.parametrize("line", commands())
def test_the_command_runs(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(README, tmp_path)
    monkeypatch.chdir(tmp_path)
    program, *arguments = shlex.split(line)
    assert program == "spdsl"
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("page, text", PROGRAMS)
def test_the_program_runs(page: Path, text: str, tmp_path: Path) -> None:
    assert "assert " in text
    written(page, tmp_path)
    (tmp_path / "example.py").write_text(text, encoding="utf-8")
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    around = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "example.py")], cwd=tmp_path, env=around | {"PYTHONPATH": paths},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
