"""The generated text: keeps its format, imports nothing unexpected, misses no name, says where it comes from."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest
from ruff.__main__ import find_ruff_bin

import spdsl
from spdsl import resources
from spdsl.codegen.render import formatted

PATTERNS = sorted(Path(resources.folder("patterns")).glob("*.spat"))
ALLOWED = {"__future__", "collections.abc", "functools", "typing", "torch", "spdsl.runtime", "spdsl.runtime.language"}


@pytest.mark.parametrize("path", PATTERNS, ids=lambda path: path.stem)
def test_text(path: Path) -> None:
    text = spdsl.compile(path).text
    assert formatted(text) == text
    imported = {
        name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert imported <= ALLOWED
    assert re.search(rf"{path.name}:\d+", text)
    found = subprocess.run(
        [find_ruff_bin(), "check", "--isolated", "--select", "F821,F811,F401", "-"], input=text, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout
