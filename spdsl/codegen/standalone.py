"""standalone: a module with the part of the library that it uses, as a package that needs no spdsl.

nsa/__init__.py     the module
nsa/runtime/rt.py   the names of the library that it uses, and those of the tools
nsa/runtime/...     the files that these names need, as they are but for their imports
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable

from spdsl.codegen.syntax_tree import parsed

LIBRARY = "spdsl.runtime"
_OF_LIBRARY = re.compile(rf"^( *from ){re.escape(LIBRARY)}(\.| )", re.MULTILINE)
_USED = re.compile(r"\brt\.(\w+)")


def standalone(text: str) -> dict[str, str]:
    """The files of the package, by path inside it: the module's text, and what it uses of the library."""
    names = sorted({*_USED.findall(text), *tool_names()})
    homes = {name: home for name, home in exported().items() if name in names}
    package = {"__init__.py": _relative(text, 1, "runtime"), "runtime/rt.py": _relative(_exports(homes), 1)}
    for module in sorted(_reached([*homes.values(), f"{LIBRARY}.language"])):
        path = _path(module)
        package[f"runtime/{path}"] = _relative(library_texts()[path], path.count("/") + 1)
        for folder in path.split("/")[:-1]:
            package[f"runtime/{folder}/__init__.py"] = library_texts()[f"{folder}/__init__.py"]
    package["runtime/__init__.py"] = library_texts()["__init__.py"]
    return package


@cache
def library_texts() -> dict[str, str]:
    """The files of the library, by path inside it."""
    return dict(_texts(files(LIBRARY), ""))


def _texts(folder: Traversable, inside: str) -> Iterable[tuple[str, str]]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _texts(path, f"{inside}{path.name}/")
        elif path.name.endswith(".py"):
            yield f"{inside}{path.name}", path.read_text(encoding="utf-8")


@cache
def exported() -> dict[str, str]:
    """The names of rt.py with the modules that define them."""
    nodes = parsed(library_texts()["rt.py"]).body
    return {
        name.name: node.module
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(LIBRARY)
        for name in node.names
    }


@cache
def tool_names() -> tuple[str, ...]:
    """What recording, tuning and binaries use of a module's library, whatever its pattern."""
    nodes = (node for node in parsed(library_texts()["rt.py"]).body if isinstance(node, ast.Assign))
    return next(tuple(ast.literal_eval(node.value)) for node in nodes if ast.unparse(node.targets[0]) == "TOOLS")


def _exports(homes: dict[str, str]) -> str:
    by_home: dict[str, list[str]] = {}
    for name, home in homes.items():
        by_home.setdefault(home, []).append(name)
    lines = [f"from {home} import {', '.join(sorted(by_home[home]))}" for home in sorted(by_home)]
    title = (
        '"""The names of the library that this module and the tools use."""\n\nfrom __future__ import annotations\n\n'
    )
    return title + "\n".join(lines) + "\n"


def _reached(modules: Iterable[str]) -> set[str]:
    """The modules of the library and all that they import of it."""
    reached: set[str] = set()
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += _imported(library_texts()[_path(module)])
    return reached


@cache
def _imported(text: str) -> tuple[str, ...]:
    nodes = ast.walk(parsed(text))
    return tuple(
        node.module
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"{LIBRARY}.")
    )


def _path(module: str) -> str:
    """`spdsl.runtime.tiles.blocks` -> `tiles/blocks.py`"""
    return module.removeprefix(f"{LIBRARY}.").replace(".", "/") + ".py"


def _relative(text: str, depth: int, inside: str = "") -> str:
    """Imports of the library as those of a package `depth` above: the copy works under any name.

    `from spdsl.runtime.tiles.blocks import jump` -> `from ..tiles.blocks import jump`
    """
    return _OF_LIBRARY.sub(
        lambda opening: f"{opening[1]}{'.' * depth}{inside}{opening[2].strip('.' if not inside else '')}", text
    )
