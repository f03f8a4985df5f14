"""What stands in a kernel and in all that it calls."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from types import ModuleType
from typing import Any

from triton.runtime.jit import JITFunction

_PRODUCTS = ("tl.dot", "tl.dot_scaled")


@cache
def multiplies(kernel: Any) -> bool:
    """Whether the kernel, or a function that it reaches, writes a matrix product."""
    calls = {ast.unparse(node.func) for text in texts(kernel) for node in ast.walk(text) if isinstance(node, ast.Call)}
    return not calls.isdisjoint(_PRODUCTS)


def texts(kernel: Any) -> list[ast.Module]:
    """The kernel and every jit function that it reaches by a name of its module, or of the library, as syntax trees."""
    found: dict[str, ast.Module] = {}
    waiting = [kernel]
    while waiting:
        function = waiting.pop()
        if not isinstance(function, JITFunction) or function.fn.__name__ in found:
            continue
        tree = ast.parse(textwrap.dedent(function.src))
        found[function.fn.__name__] = tree
        waiting += list(_mentioned(tree, function.fn.__globals__))
    return list(found.values())


@cache
def whole_text(kernel: Any) -> str:
    """The text of a kernel and of all that it calls, in one order whatever module it is in."""
    return "\n".join(sorted(ast.unparse(tree) for tree in texts(kernel)))


def _mentioned(tree: ast.Module, names: Mapping[str, Any]) -> Iterator[Any]:
    """What its names mean, and those of a module that it mentions: `load` and `rt.load`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in names:
            yield names[node.id]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = names.get(node.value.id)
            if isinstance(owner, ModuleType):
                yield getattr(owner, node.attr, None)
