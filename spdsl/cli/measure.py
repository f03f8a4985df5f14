"""What `spdsl compile` does with the kernels of the files it wrote: a report, gates, binaries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spdsl.cli.inputs import Failed

if TYPE_CHECKING:
    from spdsl.ir.plan import Plan
    from spdsl.runtime.crosscompile import Compiled

GATES = ("spills", "no-tensor-cores")
_FILE_WIDTH = 200  # columns of a report that does not go to a terminal: no cell wraps


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked of the compiled kernels."""

    report: bool
    form: str
    """`table` or `json`."""
    deny: tuple[str, ...]
    cubin: Path | None

    @property
    def any(self) -> bool:
        return self.report or self.numbers

    @property
    def numbers(self) -> bool:
        """Whether more is asked than the printed tables."""
        return (self.form == "json" and self.report) or bool(self.deny) or self.cubin is not None


def measure(paths: Sequence[Path], plans: Sequence[Plan], targets: Sequence[str], wanted: Wanted) -> None:
    """Compiles the kernels of every file for every target, and ends with 1 if a gate refuses one."""
    if wanted.report and wanted.form == "table":
        _print_tables(paths, plans, targets)
    if not wanted.numbers:
        return
    try:
        compiled = _compiled(paths, targets, wanted)
    except (RuntimeError, ImportError) as error:  # interpreter switched on, or no triton on this system
        raise Failed(f"no report: {error}") from None
    except OSError as error:
        raise Failed(f"cannot write to {wanted.cubin}: {error.strerror or error}") from None
    _end_on_offences(compiled, wanted.deny)


def _print_tables(paths: Sequence[Path], plans: Sequence[Plan], targets: Sequence[str]) -> None:
    """What the kernels of each file use, then what its plan counts."""
    from rich.console import Console

    from spdsl.compiler import report
    from spdsl.runtime.counts import tables

    console = Console()
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH)
    for path, plan in zip(paths, plans, strict=True):
        try:
            console.print(report(path, targets))
            for table in tables(plan):
                console.print(table)
        except (RuntimeError, ImportError) as error:  # interpreter switched on, or no triton on this system
            raise Failed(f"no report: {error}") from None


def _compiled(paths: Sequence[Path], targets: Sequence[str], wanted: Wanted) -> dict[Path, list[Compiled]]:
    """The kernels of every file; what the tables compiled lies in Triton's cache."""
    from rich.console import Console

    from spdsl import targets as known
    from spdsl.runtime import module_report, report

    bar = Console(stderr=True)
    gpus = [known.find(name) for name in targets or (module_report.DEFAULT_TARGET,)]
    json_wanted = wanted.report and wanted.form == "json"
    found: dict[Path, list[Compiled]] = {}
    for path in paths:
        found[path] = module_report.compile_file(path, gpus, bar if bar.is_terminal else None)
        if wanted.cubin is not None:
            written = module_report.write_binaries(path, gpus, wanted.cubin / path.stem)
            click.echo(f"{(wanted.cubin / path.stem).as_posix()}: {len(written)} files", err=json_wanted)
    if json_wanted:
        click.echo(report.to_json_of_files({path.as_posix(): rows for path, rows in found.items()}))
    return found


def _end_on_offences(compiled: dict[Path, list[Compiled]], deny: Sequence[str]) -> None:
    if not deny:
        return
    from spdsl.runtime.gates import offences

    lines = [f"{path.as_posix()}: {line}" for path, rows in compiled.items() for line in offences(rows, deny)]
    for line in lines:
        click.echo(line, err=True)
    if lines:
        raise click.exceptions.Exit(1)
