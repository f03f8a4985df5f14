"""Which kernels a generated module has."""

from __future__ import annotations

import ast
from collections.abc import Iterable


def kernels_of(text: str) -> set[str]:
    """Its jitted functions that the host names and no other jitted function does."""
    functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    jitted = [node for node in functions if _is_jitted(node)]
    helpers = {name for node in jitted for name in _named([node]) if name != node.name}
    named = _named(node for node in functions if not _is_jitted(node))
    return {node.name for node in jitted if node.name in named and node.name not in helpers}


def _is_jitted(node: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator).removeprefix("triton.") == "jit" for decorator in node.decorator_list)


def _named(functions: Iterable[ast.FunctionDef]) -> set[str]:
    """What functions read and do not bind themselves."""
    found = set()
    for function in functions:
        names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
        bound = {node.id for node in names if isinstance(node.ctx, ast.Store)}
        found |= {node.id for node in names} - bound - {each.arg for each in function.args.args}
    return found
