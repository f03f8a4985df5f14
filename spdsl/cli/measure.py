"""What `spdsl compile` does with the kernels of the files it wrote: a report, gates, binaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spdsl.cli.inputs import Failed
from spdsl.machine.build_gates import offences
from spdsl.targets import USUAL, find

if TYPE_CHECKING:
    from spdsl.ir.plan import Plan
    from spdsl.machine.crosscompile import Compiled
    from spdsl.targets import Target


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
        return self.report or bool(self.deny) or self.cubin is not None

    @property
    def tables(self) -> bool:
        return self.report and self.form == "table"

    @property
    def json(self) -> bool:
        return self.report and self.form == "json"


def measure(paths: Sequence[Path], plans: Sequence[Plan], targets: Sequence[Target], wanted: Wanted) -> None:
    """Compiles the kernels of every file for every target, and ends with 1 if a gate refuses one."""
    gpus = targets or [find(USUAL)]
    try:
        compiled = {path: _one(path, plan, gpus, wanted) for path, plan in zip(paths, plans, strict=True)}
    except (RuntimeError, ImportError) as error:  # interpreter switched on, or no triton on this system
        raise Failed(f"no report: {error}") from None
    except OSError as error:
        raise Failed(f"cannot write to {wanted.cubin}: {error.strerror or error}") from None
    if wanted.json:
        from spdsl.machine.report import to_json_of_files

        click.echo(to_json_of_files({path.as_posix(): rows for path, rows in compiled.items()}))
    if wanted.deny:
        _end_on_offences(compiled, wanted.deny)


def _one(path: Path, plan: Plan, gpus: Sequence[Target], wanted: Wanted) -> list[Compiled]:
    """The kernels of one file, with what is asked printed and written."""
    from spdsl.machine.module_report import compile_file, name_of, write_binaries

    compiled = compile_file(path, gpus)
    if wanted.tables:
        _print_tables(compiled, plan)
    if wanted.cubin is not None:
        folder = wanted.cubin / name_of(path)
        written = write_binaries(path, gpus, folder)
        click.echo(f"{folder.as_posix()}: {len(written)} files", err=wanted.json)
    return compiled


def _print_tables(compiled: Sequence[Compiled], plan: Plan) -> None:
    """What the kernels use, then what the plan counts."""
    from rich.console import Console

    from spdsl.machine.counts import gathered, tables
    from spdsl.machine.report import report

    console = Console(highlight=False)
    for part in (report(compiled), *tables(plan), *gathered(plan)):
        console.print(part)


def _end_on_offences(compiled: Mapping[Path, Sequence[Compiled]], deny: Sequence[str]) -> None:
    lines = [f"{path.as_posix()}: {line}" for path, rows in compiled.items() for line in offences(rows, deny)]
    for line in lines:
        click.echo(line, err=True)
    if lines:
        raise click.exceptions.Exit(1)
