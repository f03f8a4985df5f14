"""shadowing: public functions whose arguments would hide names that they use.

They hand the tensors, as `Inputs`, to a function of their own, in which no argument has a name of the pattern.
"""

from __future__ import annotations

import ast

from spdsl.codegen.scopes import Public, mentions
from spdsl.codegen.spelling import Spelling

_ALIAS = "_Inputs"
_COMMENT = "  # no argument has this name"


def without_shadowing(text: str, tree: ast.Module, spelling: Spelling, public: Public) -> str:
    """The text (of that tree), with no argument of a public function that hides anything."""
    nodes = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in public.functions]
    hiding = [node for node in nodes if not _arguments(node, spelling).isdisjoint(_used(node))]
    lines = text.split("\n")
    for node in reversed(hiding):
        _hand(lines, node, public)
    if hiding:
        first = min([hiding[0].lineno, *(x.lineno for x in hiding[0].decorator_list)]) - 1
        lines[first:first] = [f"{_ALIAS} = Inputs{_COMMENT}", "", ""]
    return "\n".join(lines)


def _arguments(node: ast.FunctionDef, spelling: Spelling) -> set[str]:
    """Those that the pattern names, as the caller writes them."""
    return {spelling.written(x.arg) for x in (*node.args.args, *node.args.kwonlyargs) if spelling.marks(x.arg)}


def _used(node: ast.FunctionDef) -> frozenset[str]:
    """What its body uses; annotations and defaults stand outside."""
    mentioned = mentions(*node.body)
    return mentioned.variables | mentioned.read


def _hand(lines: list[str], node: ast.FunctionDef, public: Public) -> None:
    """Ends a function behind its docstring with a call of the rest of it."""
    body = node.body[1:]
    calls = (x for statement in body for x in ast.walk(statement) if isinstance(x, ast.Call))
    call = next((x for x in calls if isinstance(x.func, ast.Name) and x.func.id == "Inputs"), None)
    if call is None:  # it takes no input of the pattern
        return
    assert call.end_lineno is not None
    made = ast.unparse(call).replace("Inputs(", f"{_ALIAS}(", 1)
    head, tail = lines[call.lineno - 1][: call.col_offset], lines[call.end_lineno - 1][call.end_col_offset :]
    others = [x for x in (*node.args.args, *node.args.kwonlyargs) if x.arg not in public.names]
    typed = ", ".join(["inputs: Inputs", *(f"{x.arg}: {ast.unparse(x.annotation)}" for x in others if x.annotation)])
    given = ", ".join([made, *(x.arg for x in others)])
    if node.args.kwarg is not None:
        typed, given = f"{typed}, **{node.args.kwarg.arg}: Any", f"{given}, **{node.args.kwarg.arg}"
    start = body[0].lineno - 1
    rest = [*lines[start : call.lineno - 1], f"{head}inputs{tail}", *lines[call.end_lineno : node.end_lineno]]
    lines[start : node.end_lineno] = [
        f"    return _{node.name}_of_inputs({given})", "", "", f"def _{node.name}_of_inputs({typed}) -> Any:", *rest,
    ]  # fmt: skip
