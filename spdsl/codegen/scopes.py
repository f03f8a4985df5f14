"""scopes: which names of a module's text meet each other.

A scope is one definition with all that it mentions, or the module's own level. In it a name made of the pattern's may
be neither one that the text uses itself nor the same as another made name.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from spdsl.codegen.prune import Definition
from spdsl.codegen.spelling import Spelling

# Triton puts the arguments of a kernel beside names of its own, and those of a launch.
_LAUNCHER = frozenset("backend num_ctas num_stages num_warps options params specialization specialize_impl".split())
_OF_TUPLES = frozenset("count index type values".split())  # attributes of tuples, Python's and Triton's


@dataclass(frozen=True, slots=True)
class Public:
    """Where names stay as the pattern has them: `names`, with marks, in these functions and as fields of `inputs`."""

    names: frozenset[str]
    functions: frozenset[str]

    def holds(self, node: ast.stmt) -> bool:
        return isinstance(node, Definition) and (node.name in self.functions or node.name == "Inputs")


@dataclass(frozen=True, slots=True)
class Mentions:
    """The names of a statement of the module's own level: variables that it has or binds, and names that it reads."""

    variables: frozenset[str]
    read: frozenset[str]


@dataclass(frozen=True, slots=True)
class Scope:
    """`own`: the text's names; `made`: those made of the pattern's, with marks."""

    own: frozenset[str]
    made: frozenset[str]


def mentions(*nodes: ast.AST) -> Mentions:
    variables, read = set[str](), set[str]()
    for part in (part for node in nodes for part in _parts(node)):
        if isinstance(part, ast.Name):
            (read if isinstance(part.ctx, ast.Load) else variables).add(part.id)
        elif isinstance(part, ast.arg):
            variables.add(part.arg)
        elif isinstance(part, Definition):
            variables.add(part.name)
        elif isinstance(part, ast.alias):
            variables.add(part.asname or part.name)
    return Mentions(frozenset(variables), frozenset(read))


def _parts(node: ast.AST) -> Iterator[ast.AST]:
    """As `ast.walk`, in half its time."""
    waiting = [node]
    while waiting:
        part = waiting.pop()
        yield part
        for name in part._fields:
            value = getattr(part, name, None)
            if isinstance(value, list):
                waiting += [x for x in value if isinstance(x, ast.AST)]
            elif isinstance(value, ast.AST) and name != "ctx":
                waiting.append(value)


def scopes(module: ast.Module, spelling: Spelling, public: Public) -> list[Scope]:
    """Of a text with marks."""
    inner, bound, read = [], set[str](), set[str]()
    for node in module.body:
        names = mentions(node)
        inner.append(_scope(node, names, spelling, public))
        defines = isinstance(node, Definition)
        bound |= {node.name} if isinstance(node, Definition) else names.variables
        read |= names.read - names.variables if defines else names.read
    made = frozenset(name for name in bound if spelling.marks(name))
    return [*inner, Scope(frozenset(read | bound) - made, made)]


def _scope(node: ast.stmt, names: Mentions, spelling: Spelling, public: Public) -> Scope:
    mentioned = names.variables | names.read
    kept = mentioned & public.names if public.holds(node) else frozenset[str]()
    made = frozenset(name for name in mentioned - kept if spelling.marks(name))
    own = {spelling.written(name) for name in mentioned - made}
    if isinstance(node, ast.ClassDef) and node.name != "Inputs":
        own |= _OF_TUPLES
    elif isinstance(node, ast.FunctionDef) and any(ast.unparse(x) == "rt.jit" for x in node.decorator_list):
        own |= _LAUNCHER
    return Scope(frozenset(own), made)


def chosen_names(all_scopes: list[Scope], spelling: Spelling) -> list[str]:
    """The spelling of each name by its number: its own, or the first with a number behind that meets nothing."""
    marks = {name: spelling.marks(name) for scope in all_scopes for name in scope.made}
    around: dict[int, list[tuple[Scope, list[str]]]] = {}
    for scope in all_scopes:
        for number in {number for name in scope.made for number in marks[name]}:
            around.setdefault(number, []).append((scope, [name for name in scope.made if number in marks[name]]))
    chosen: list[str] = []
    for number, name in enumerate(spelling.names):
        places, again = around.get(number, ()), 0
        chosen.append(name)
        while any(_meets(scope, made, marks, spelling, chosen) for scope, made in places):
            again += 1
            chosen[-1] = f"{name}_{again}"
    return chosen


def _meets(scope: Scope, made: list[str], marks: dict[str, set[int]], spelling: Spelling, chosen: list[str]) -> bool:
    """Whether one of `made` meets a name of the scope, as far as names are `chosen`."""
    known = {name for name in scope.made if max(marks[name]) < len(chosen)}
    new = [spelling.spelled(name, chosen) for name in made if name in known]
    others = {spelling.spelled(name, chosen) for name in known.difference(made)}
    return len(set(new)) < len(new) or not scope.own.isdisjoint(new) or not others.isdisjoint(new)
