"""`spdsl compile`"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spdsl.cli.inputs import (
    Definitions,
    Failed,
    diagnostics_end_it,
    parameter_option,
    parameters,
    pattern_names,
    pattern_option,
    print_diagnostics,
    read_source,
    source_file,
)

if TYPE_CHECKING:
    from spdsl.diagnostics import Source
    from spdsl.ir.plan import Plan

_FILE_WIDTH = 200  # columns of a report that does not go to a terminal: no cell wraps
_STAGES = ["tree", "pattern", "aligned", "plan", "module"]


@click.command("compile")
@source_file
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=Path), default=Path("."), help="Folder.")
@pattern_option
@parameter_option
@click.option("--target", "targets", multiple=True, metavar="NAME", help="A GPU for --report, such as h200.")
@click.option("--emit", "stage", type=click.Choice(_STAGES), help="Prints a stage instead of writing files.")
@click.option("--report", is_flag=True, help="Prints what the kernels use, cross-compiled, and FLOPs and bytes.")
@click.option("--force", is_flag=True, help="Overwrites files that spdsl did not make.")
def compile_file(
    file: str,
    output: Path,
    pattern: str | None,
    definitions: Definitions,
    targets: tuple[str, ...],
    stage: str | None,
    report: bool,
    force: bool,
) -> None:
    """Compiles every pattern of FILE into DIR/<pattern>.py."""
    if targets and not report:
        raise click.UsageError("--target names what --report is about: give both")
    _expect_known(targets)
    with diagnostics_end_it():
        source = read_source(file)
        names = pattern_names(source, pattern)
        if stage is not None:
            _emit(source, names, parameters(definitions), stage)
            return
        written = _write(source, names, parameters(definitions), output, force)
    if report:
        from spdsl.compiler import plan_of

        _report(written, targets, [plan_of(source, name, parameters(definitions)) for name in names])


def _emit(source: Source, names: Sequence[str], params: dict[str, Fraction], stage: str) -> None:
    from spdsl.compiler import emit

    for name in names:
        click.echo(emit(source, name, params, stage))


def _write(source: Source, names: Sequence[str], params: dict[str, Fraction], folder: Path, force: bool) -> list[Path]:
    """Compiles all before it writes the first: an error leaves nothing behind."""
    from spdsl.cli.output import Foreign, write_module
    from spdsl.compiler import compile as compile_pattern

    modules = [compile_pattern(source, name, params) for name in names]
    if len({module.name.lower() for module in modules}) < len(modules):
        raise Failed("two patterns differ in case only; their files would be one on many systems: use -p")
    written = []
    for module in modules:
        print_diagnostics(source, module.diagnostics)
        try:
            path = write_module(folder, module.name, module.text, force=force)
        except Foreign as error:
            raise Failed(f"{error}; --force overwrites it") from None
        except OSError as error:
            raise Failed(f"cannot write to {folder}: {error.strerror or error}") from None
        click.echo(path.as_posix())
        written.append(path)
    return written


def _expect_known(targets: Sequence[str]) -> None:
    from spdsl.targets import find

    for name in targets:
        try:
            find(name)
        except ValueError as error:
            raise click.UsageError(str(error)) from None


def _report(paths: Sequence[Path], targets: Sequence[str], plans: Sequence[Plan]) -> None:
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
