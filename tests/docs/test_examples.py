"""The Python examples of the documents that are whole programs run, and hold what they assert."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def programs(page: Path) -> list[str]:
    """The Python blocks of a page that import what they use."""
    found = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [text for text in found if text.startswith("import spdsl\nimport torch\n")]


PROGRAMS = [
    pytest.param(text, id=f"{page.stem}-{i}")
    for page in sorted((ROOT / "docs").glob("*.md"))
    for i, text in enumerate(programs(page))
]


def test_there_is_a_program() -> None:
    assert PROGRAMS


@pytest.mark.parametrize("text", PROGRAMS)
def test_the_program_runs(text: str, tmp_path: Path) -> None:
    assert "assert " in text
    (tmp_path / "example.py").write_text(text, encoding="utf-8")
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    around = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "example.py")], cwd=ROOT, env=around | {"PYTHONPATH": paths},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
