"""Modules see the library as one: a name means one thing in all of its files."""

from __future__ import annotations

import ast
from collections import defaultdict

from spdsl.codegen.standalone import library_texts


def test_no_two_files_define_one_name() -> None:
    homes: dict[str, list[str]] = defaultdict(list)
    for path, text in library_texts().items():
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                homes[node.name].append(path)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    homes[ast.unparse(target)].append(path)
    for name in ("__all__", "jit", "tl", "triton"):
        homes.pop(name, None)
    public = {name: where for name, where in homes.items() if not name.startswith("_")}
    assert {name: where for name, where in public.items() if len(where) > 1} == {}
