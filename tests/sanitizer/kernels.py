"""Which kernels a generated module has: its own, and those of the library that it can start."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from typing import NamedTuple

from spdsl.codegen.standalone import LIBRARY, exported, library_texts

_MODULE = ""  # the home of what the module itself defines
Place = tuple[str, str]
"""Where something is defined, and its name there."""


class File(NamedTuple):
    """The statements of a file that define names, and what it imports of the library."""

    defined: dict[str, ast.stmt]
    imported: dict[str, Place]


def kernels_of(text: str) -> set[str]:
    """The jitted functions that host functions name and no other jitted function does, of all that the module uses."""
    nodes = _used(text)
    functions = {place: node for place, node in nodes.items() if isinstance(node, ast.FunctionDef)}
    jitted = {place: node for place, node in functions.items() if _is_jitted(node)}
    helpers = {named for place, node in jitted.items() for named in _named(text, place[0], node) if named != place}
    hosts = {place: node for place, node in functions.items() if place not in jitted}
    started = {named for place, node in hosts.items() for named in _named(text, place[0], node)}
    return {name for home, name in jitted if (home, name) in started - helpers}


def _used(text: str) -> dict[Place, ast.stmt]:
    """What the module defines, and what that needs of the library, definition by definition."""
    waiting = [(_MODULE, name) for name in _file(text).defined]
    found: dict[Place, ast.stmt] = {}
    while waiting:
        place = waiting.pop()
        if place not in found:
            node = found[place] = _contents(text, place[0]).defined[place[1]]
            named = _named(text, place[0], node)
            waiting += [pool for pool in named if _is_asked(text, pool)] if place[1] == "POOLS" else named
    return found


def _is_asked(text: str, pool: Place) -> bool:
    """Whether the module asks for a pool of the table by its name: each has a file of that name."""
    return f'"{pool[0].rpartition(".")[2]}"' in text


def _contents(text: str, home: str) -> File:
    path = home.removeprefix(f"{LIBRARY}.").replace(".", "/") + ".py"
    return _file(text if home == _MODULE else library_texts()[path])


@cache
def _file(text: str) -> File:
    defined: dict[str, ast.stmt] = {}
    imported: dict[str, Place] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            defined |= dict.fromkeys(_bound(node), node)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"{LIBRARY}."):
            imported |= {name.name: (node.module, name.name) for name in node.names}
    return File(defined, imported)


def _named(text: str, home: str, node: ast.stmt) -> set[Place]:
    """What a statement reads and does not bind itself: of its file, of what that imports, and of `rt`."""
    own = _contents(text, home)
    names = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)} - _bound(node)
    found = {(home, name) for name in names if name in own.defined}
    found |= {own.imported[name] for name in names if name in own.imported}
    found |= {(exported()[name], name) for name in _of_rt(node) if name in exported()}
    return {(place, name) for place, name in found if name in _contents(text, place).defined}


def _of_rt(node: ast.stmt) -> Iterator[str]:
    for each in ast.walk(node):
        if isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name) and each.value.id == "rt":
            yield each.attr


def _bound(node: ast.stmt) -> set[str]:
    names = (each for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store))
    arguments: Iterable[ast.arg] = node.args.args if isinstance(node, ast.FunctionDef) else ()
    return {each.id for each in names} | {each.arg for each in arguments}


def _is_jitted(node: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator).split(".")[-1] == "jit" for decorator in node.decorator_list)
