"""prune: a module without the helpers that this pattern does not need."""

from __future__ import annotations

import ast

from spdsl.codegen.syntax_tree import parsed

Definition = ast.FunctionDef | ast.ClassDef


def prune(text: str, public: frozenset[str]) -> str:
    """The text without top-level definitions that neither `public` names nor other statements reach."""
    module = parsed(text)
    definitions = [node for node in module.body if isinstance(node, Definition)]
    reached = _reached(module, definitions, public)
    lines = text.split("\n")
    for node in reversed(definitions):
        if node.name not in reached:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
            while first and lines[first - 1].startswith("# ") and not lines[first - 1].startswith("# ----"):
                first -= 1  # the comment above it
            del lines[first : node.end_lineno]
    return "\n".join(lines)


def _reached(module: ast.Module, definitions: list[Definition], public: frozenset[str]) -> set[str]:
    uses = {node.name: _names(node) for node in definitions}
    others = [node for node in module.body if not isinstance(node, Definition)]
    waiting = {name for node in others for name in _names(node)} | public | {"_"}
    waiting |= {name for node in definitions if _registers(node) for name in (node.name, *_names(node))}
    reached: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting |= uses.get(name, set())
    return reached


_HARMLESS = ("rt.jit", "torch.no_grad", "MODULE.tuned", "MODULE.entry", "MODULE.step")


def _registers(node: Definition) -> bool:
    """Its decorators do more than wrap it: defining it has an effect."""
    return any(ast.unparse(decorator).split("(")[0] not in _HARMLESS for decorator in node.decorator_list)


def _names(node: ast.AST) -> set[str]:
    """Every name that the node mentions, annotations in strings included."""
    parts = list(ast.walk(node))
    strings = {part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)}
    return {part.id for part in parts if isinstance(part, ast.Name)} | strings
