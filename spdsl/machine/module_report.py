"""What the kernels of a generated file cost on some GPUs: load, survey, cross-compile, table."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from types import ModuleType

from rich.console import Console

from spdsl import targets
from spdsl.machine import report as tables
from spdsl.machine.crosscompile import Compiled
from spdsl.machine.cubins import write
from spdsl.machine.record import refuse_interpreter
from spdsl.machine.survey import survey
from spdsl.tables import Fitted
from spdsl.targets import Target


def report(path: Path, names: Sequence[str] = ()) -> Fitted:
    """One row for each kernel of the generated file and each target (by default h100); a bar on a terminal meanwhile.

    ValueError for an unknown target; RuntimeError under TRITON_INTERPRET, or for a file that spdsl did not make.
    """
    return tables.report(compile_file(path, [targets.find(name) for name in names or (targets.USUAL,)]))


def compile_file(path: Path, wanted: Sequence[Target]) -> list[Compiled]:
    """Every kernel of the generated file for every target, with the configurations of the target's architecture."""
    refuse_interpreter()
    terminal = Console(stderr=True)
    console = terminal if terminal.is_terminal else None
    compiled: list[Compiled] = []
    with loaded(path) as module:
        for _, group in groupby(wanted, key=lambda target: target.architecture):
            same = list(group)
            compiled += tables.compile_all(survey(module, target=same[0]), same, console=console)
    return compiled


def write_binaries(path: Path, wanted: Sequence[Target], folder: Path) -> list[Path]:
    """The binaries of every launch of the generated file for every target, with manifest and loader."""
    refuse_interpreter()
    with loaded(path) as module:
        return write(folder, [(launch, target) for target in wanted for launch in survey(module, target=target)])


@contextmanager
def loaded(path: Path) -> Iterator[ModuleType]:
    """The file as a module under a name of its own, there for as long as it is used."""
    name = f"spdsl_report_{name_of(path)}_{sha256(path.read_bytes()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"{path} is no Python module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        missing = [x for x in ("MODULE", "PHASES", "example_inputs", "rt") if not hasattr(module, x)]
        if missing:
            raise RuntimeError(f"{path} has no {' and no '.join(missing)}: not made by spdsl")
        yield module
    finally:
        for own in [own for own in sys.modules if own == name or own.startswith(f"{name}.")]:
            del sys.modules[own]


def name_of(path: Path) -> str:
    """Of the file of a module, or of the first one of a package."""
    return path.parent.name if path.stem == "__init__" else path.stem
