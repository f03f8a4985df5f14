"""The library that a generated module uses: ours, or that of its own folder."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

from spdsl.codegen.standalone import standalone
from spdsl.runtime.tuning.gpu import use_tables


def home(module: ModuleType, name: str) -> ModuleType:
    """The file of the library in which `rt.name` is defined."""
    found = getattr(module.rt, name)
    return sys.modules[getattr(found, "fn", found).__module__]  # `fn` of a jitted one


def launches(module: ModuleType) -> ModuleType:
    """Where it is settled whether CPU tensors take the kernels (KERNELS_ON_CPU, INTERPRETED)."""
    return home(module, "launch")


def users(module: ModuleType, function: object) -> list[ModuleType]:
    """The files of the library that have the function under its name."""
    library = module.rt.__name__.removesuffix("rt")
    name: str = getattr(function, "fn", function).__name__
    loaded = [file for own, file in sys.modules.items() if own.startswith(library)]
    return [file for file in loaded if getattr(file, name, None) is function]


@contextmanager
def tables(architecture: str, processors: int) -> Iterator[None]:
    """Within it every launch is one for that GPU."""
    use_tables(architecture, processors)
    try:
        yield
    finally:
        use_tables(None)


@cache
def in_library(file: str) -> bool:
    """Whether the file is one of the library, or of a copy of it."""
    return any(folder.name == "runtime" and (folder / "rt.py").is_file() for folder in Path(file).parents)


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
