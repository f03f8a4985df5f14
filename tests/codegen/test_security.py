"""Text of a source inside the generated module: it stays text."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest

import spdsl

BODY = "pattern p {{ {0}\n causal return attend(sliding(4)) }}"
HARMLESS = "# plain"
NASTY = [
    '# """\n# import os; os.abort()',
    "# \\",
    '# \\"""',
    "# {{ 1/0 }} {% for x in y %} {# open",
    '# ends with a quote"',
    '# """" + __import__("os").getcwd() + """"',
    "# \\N{BULLET} \\u0022\\u0022\\u0022 \\x22",
    "# '''",
]


def shape(text: str) -> str:
    """The code of a module without its docstring, digest and source hash."""
    module = ast.parse(text)
    assert isinstance(module.body[0], ast.Expr)
    return "\n".join(ast.unparse(node) for node in module.body[1:] if "MODULE =" not in ast.unparse(node))


@pytest.mark.parametrize("comment", NASTY)
@pytest.mark.parametrize("place", ["above", "inside"])
def test_comments_cannot_inject(comment: str, place: str) -> None:
    def source(text: str) -> str:
        return f"{text}\n{BODY.format('')}" if place == "above" else BODY.format(text)

    harmless = "\n".join([HARMLESS] * len(comment.split("\n")))
    assert shape(spdsl.compile(source(comment)).text) == shape(spdsl.compile(source(harmless)).text)


def test_the_text_does_not_depend_on_the_process() -> None:
    code = "import spdsl; print(spdsl.compile('patterns/longformer.spat').text)"
    texts = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("0", "4711")
    }
    assert len(texts) == 1
