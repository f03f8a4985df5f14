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
from tests.cost import calls

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


@pytest.mark.parametrize("pattern", [calls.DECODED, calls.FILLED], ids=["decode", "prefill"])
def test_without_training_nothing_of_a_backward_is_printed(pattern: str) -> None:
    text = spdsl.compile(pattern).text
    assert not re.search(r"_dq|_dkdv|delta|dout|kernel_backward|backward_of|Backward", text)
    assert re.search("_dq.*_dkdv", spdsl.compile(re.sub(" if .*", "", pattern)).text, re.DOTALL)


def test_of_several_softmaxes_those_that_train_have_a_backward() -> None:
    text = spdsl.compile("pattern p { causal return attend(all) if train return attend(sliding(8)) }").text
    named = set(re.findall(r"def (\w+)_(?:dq|dkdv|kernel_backward|backward_of)\(", text))
    assert named == {"attend"}
    assert set(re.findall(r"(\w+)_forward_op,", text)) == {"attend"}
