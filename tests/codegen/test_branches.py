"""Triton gives a name one type: kernels bind no argument anew inside of a branch that leaves."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

GOLDENS = sorted((Path(__file__).parents[1] / "golden").glob("*.py"))
MODULES = [path for path in GOLDENS if not path.name.startswith(("test_", "__"))]


def rebound(text: str) -> list[str]:
    """`function: name` of every argument of a kernel that a branch with a `return` binds anew."""
    found = []
    for function in ast.walk(ast.parse(text)):
        if not isinstance(function, ast.FunctionDef) or "rt.jit" not in map(ast.unparse, function.decorator_list):
            continue
        arguments = {argument.arg for argument in function.args.args}
        leaving = (x for x in ast.walk(function) if isinstance(x, ast.If) and isinstance(x.body[-1], ast.Return))
        for statement in (part for branch in leaving for part in branch.body if isinstance(part, ast.Assign)):
            names = {x.id for target in statement.targets for x in ast.walk(target) if isinstance(x, ast.Name)}
            found += [f"{function.name}: {name}" for name in sorted(names & arguments)]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_no_argument_is_bound_anew(path: Path) -> None:
    assert rebound(path.read_text(encoding="utf-8")) == []


def test_one_that_is_bound_anew_is_seen() -> None:
    text = "@rt.jit\ndef f(x, C):\n    if C.EMPTY:\n        x = rt.at(x, 0, 0, 0)\n        return\n"
    assert rebound(text) == ["f: x"]
