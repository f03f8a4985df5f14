"""Device files stand in one module together: a name means one thing in all of them."""

from __future__ import annotations

import ast
from collections import defaultdict
from importlib.resources import files


def test_no_two_files_define_one_name() -> None:
    homes: dict[str, list[str]] = defaultdict(list)
    for path in files("spdsl.device").iterdir():
        if not path.name.endswith(".py"):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                homes[node.name].append(path.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    homes[ast.unparse(target)].append(path.name)
    homes.pop("jit", None)
    assert {name: where for name, where in homes.items() if len(where) > 1} == {}
