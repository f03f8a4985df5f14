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
    allow_option,
    diagnostics_end_it,
    length_option,
    parameter_option,
    parameters,
    pattern_names,
    pattern_option,
    print_diagnostics,
    read_source,
    setting,
    source_file,
)
from spdsl.cli.measure import Wanted, measure
from spdsl.runtime.gates import GATES

if TYPE_CHECKING:
    from spdsl.checks.view import Setting
    from spdsl.diagnostics import Source

_STAGES = ["tree", "pattern", "aligned", "plan", "module"]


@click.command("compile")
@source_file
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=Path), default=Path("."), help="Folder.")
@pattern_option
@parameter_option
@click.option("--target", "targets", multiple=True, metavar="NAME", help="A GPU for --report and the like: h200.")
@length_option
@allow_option
@click.option("--emit", "stage", type=click.Choice(_STAGES), help="Prints a stage instead of writing files.")
@click.option("--report", is_flag=True, help="Prints what the kernels use, cross-compiled, and FLOPs and bytes.")
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table", help="Of --report.")
@click.option("--deny", multiple=True, type=click.Choice(GATES), help="Ends with 1 if a kernel has that; for CI.")
@click.option("--cubin", type=click.Path(file_okay=False, path_type=Path), metavar="DIR", help="Writes binaries there.")
@click.option("--force", is_flag=True, help="Overwrites files that spdsl did not make.")
def compile_file(
    file: str,
    output: Path,
    pattern: str | None,
    definitions: Definitions,
    targets: tuple[str, ...],
    length: int | None,
    allowed: tuple[str, ...],
    stage: str | None,
    report: bool,
    form: str,
    deny: tuple[str, ...],
    cubin: Path | None,
    force: bool,
) -> None:
    """Compiles every pattern of FILE into DIR/<pattern>.py."""
    wanted = Wanted(report, form, deny, cubin)
    if targets and not wanted.any and length is None:
        raise click.UsageError("--target names what --report, --deny, --cubin or --length is about: give both")
    _expect_known(targets)
    with diagnostics_end_it():
        source = read_source(file)
        names = pattern_names(source, pattern)
        if stage is not None:
            _emit(source, names, parameters(definitions), stage)
            return
        judged = setting(targets, length, allowed)
        written = _write(source, names, parameters(definitions), judged, output, force)
    for path in written:
        click.echo(path.as_posix(), err=report and form == "json")
    if wanted.any:
        from spdsl.compiler import plan_of

        measure(written, [plan_of(source, name, parameters(definitions)) for name in names], targets, wanted)


def _emit(source: Source, names: Sequence[str], params: dict[str, Fraction], stage: str) -> None:
    from spdsl.compiler import emit

    for name in names:
        click.echo(emit(source, name, params, stage))


def _write(
    source: Source, names: Sequence[str], params: dict[str, Fraction], judged: Setting, folder: Path, force: bool
) -> list[Path]:
    """Compiles all before it writes the first: an error leaves nothing behind."""
    from spdsl.cli.output import Foreign, write_module
    from spdsl.compiler import compile as compile_pattern

    modules = [compile_pattern(source, name, params, judged) for name in names]
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
        written.append(path)
    return written


def _expect_known(targets: Sequence[str]) -> None:
    from spdsl.targets import find

    for name in targets:
        try:
            find(name)
        except ValueError as error:
            raise click.UsageError(str(error)) from None
