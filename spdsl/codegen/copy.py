"""copy: device code as text.

Files of `spdsl.device` stand in a generated module without their docstring and imports.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

from spdsl.codegen.parsed import parsed

DEVICE = "spdsl.device"


@dataclass(frozen=True, slots=True)
class DeviceText:
    """The code of one file, and the imports it needs from elsewhere."""

    body: str
    imports: tuple[str, ...]


def device_files() -> list[str]:
    """The names of all device files; a module's unused imports are removed once it is whole."""
    names = (path.name for path in files(DEVICE).iterdir())
    return sorted(name.removesuffix(".py") for name in names if name.endswith(".py") and name != "__init__.py")


@lru_cache
def device_text(name: str) -> DeviceText:
    """The text of `spdsl/device/<name>.py`."""
    text = files(DEVICE).joinpath(f"{name}.py").read_text(encoding="utf-8")
    lines = text.split("\n")
    module = parsed(text)
    imports = [node for node in module.body if isinstance(node, ast.Import | ast.ImportFrom)]
    last = max(node.end_lineno or 0 for node in imports)
    outside = tuple(ast.unparse(node) for node in imports if not _ours(node))
    return DeviceText("\n".join(lines[last:]).strip("\n"), outside)


def _ours(node: ast.Import | ast.ImportFrom) -> bool:
    module = node.module if isinstance(node, ast.ImportFrom) else ""
    return (module or "").startswith(DEVICE) or module == "__future__"


def merged_imports(lines: list[str]) -> str:
    """Import lines of several files, each name once, sorted: standard library, then torch and triton."""
    plain: set[str] = set()
    names: dict[str, set[str]] = {}
    for line in lines:
        for node in parsed(line).body:
            if isinstance(node, ast.Import):
                plain |= {ast.unparse(ast.Import([alias])) for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.setdefault(node.module or "", set()).update(alias.name for alias in node.names)
    plain_torch = {line for line in plain if line.split()[1].split(".")[0] in ("torch", "triton")}
    names.setdefault("types", set()).add("SimpleNamespace")
    names.setdefault("typing", set()).add("Any")
    standard = sorted(plain - plain_torch)
    others = sorted(module for module in names if module != "torch")
    standard += [f"from {module} import {', '.join(sorted(names[module]))}" for module in others]
    outside = sorted(line for line in plain_torch if "triton" not in line)
    outside += [f"from torch import {', '.join(sorted(names['torch']))}"] if "torch" in names else []
    return "\n".join([*standard, "", *outside])
