"""The library that a generated module uses: ours, or that of its own folder."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from spdsl.codegen.standalone import standalone


def home(module: ModuleType, name: str) -> ModuleType:
    """The file of the library in which `rt.name` is defined."""
    return sys.modules[getattr(module.rt, name).__module__]


def launches(module: ModuleType) -> ModuleType:
    """Where it is settled whether CPU tensors take the kernels (KERNELS_ON_CPU, INTERPRETED)."""
    return home(module, "launch")


def package_from(files: Mapping[str, str], folder: Path) -> ModuleType:
    """Imports a standalone module from its files, under a name of its own."""
    name = f"standalone_{hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:16]}"
    for path, text in files.items():
        place = folder / name / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, folder / name / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def broken(text: str, old: str, new: str, folder: Path) -> ModuleType:
    """The module with every `old` replaced, in its own text or in the library's; the change must be real."""
    files = standalone(text)
    changed = {path: part.replace(old, new) for path, part in files.items()}
    assert changed != files, f"{old!r} does not occur"
    return package_from(changed, folder)
