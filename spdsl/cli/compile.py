"""`spdsl compile`"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spdsl.cli.inputs import Failed, Job, diagnostics_end_it, jobs, once, print_diagnostics, read_source
from spdsl.cli.measure import Wanted, measure
from spdsl.cli.options import (
    LENGTH,
    Definitions,
    allow_option,
    output_folder,
    parameter_option,
    pattern_option,
    source_files,
    target_option,
)
from spdsl.machine.build_gates import GATES

if TYPE_CHECKING:
    from spdsl.checks.view import Setting
    from spdsl.targets import Target

_STAGES = ["tree", "pattern", "aligned", "plan", "steps", "module"]
_EPILOG = """Exit codes: 0 all is written (warnings are printed), 1 a source has errors or
a kernel what --deny refuses, 2 the command cannot be carried out.

\b
Example: spdsl compile patterns/streaming_llm.spat -o build -D window=3k --report"""


@click.command("compile", short_help="Compiles .spat files into Python modules.", epilog=_EPILOG)
@source_files
@output_folder
@pattern_option
@parameter_option
@target_option("A GPU for --report, --deny, --cubin or --length, or several, each with --target", usual=True)
@click.option(
    "--length", type=LENGTH, metavar="TOKENS", help="The length to judge by, such as 64k; else that of `expect`."
)
@allow_option
@click.option("--emit", "stage", type=click.Choice(_STAGES), help="Prints a stage instead of writing files.")
@click.option("--report", is_flag=True, help="Prints what the kernels use, cross-compiled, and FLOPs and bytes.")
@click.option(
    "--format", "form", type=click.Choice(["table", "json"]), default="table", show_default=True, help="Of --report."
)
@click.option("--deny", multiple=True, type=click.Choice(GATES), help="Ends with 1 if a kernel has that; for CI.")
@click.option("--cubin", type=click.Path(file_okay=False, path_type=Path), metavar="DIR", help="Writes binaries there.")
@click.option(
    "--standalone", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
    help="Writes DIR/<pattern>/ instead: a package with all that it needs, for where spdsl is not installed.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Overwrites files that spdsl did not make.")
def compile_file(
    files: tuple[str, ...],
    output: Path,
    pattern: str | None,
    definitions: Definitions,
    targets: tuple[Target, ...],
    length: int | None,
    allowed: tuple[str, ...],
    stage: str | None,
    report: bool,
    form: str,
    deny: tuple[str, ...],
    cubin: Path | None,
    standalone: Path | None,
    force: bool,
) -> None:
    """Compiles every pattern of each FILE into DIR/<pattern>.py. `-` as FILE is standard input."""
    wanted = Wanted(report, form, deny, cubin)
    if targets and not wanted.any and length is None:
        raise click.UsageError("--target names what --report, --deny, --cubin or --length is about: give both")
    with diagnostics_end_it():
        work = jobs([read_source(path) for path in once(files)], pattern, definitions)
        if stage is not None:
            _emit(work, stage)
            return
        write = _module_writer(output, force) if standalone is None else _package_writer(standalone, force)
        written = _write(work, _setting(targets, length, allowed), standalone or output, write)
    for path in written:
        click.echo(path.as_posix(), err=report and form == "json")
    if wanted.any:
        from spdsl.compiler import plan_of

        measure(written, [plan_of(task.source, task.name, task.params) for task in work], targets, wanted)


def _setting(targets: Sequence[Target], length: int | None, allowed: Sequence[str]) -> Setting:
    from spdsl.checks.view import Setting

    return Setting(tuple(targets), length, frozenset(allowed))


def _emit(work: Sequence[Job], stage: str) -> None:
    from spdsl.compiler import emit

    for task in work:
        click.echo(emit(task.source, task.name, task.params, stage))


def _module_writer(folder: Path, force: bool) -> Callable[[str, str], Path]:
    from spdsl.cli.output import write_module

    return lambda name, text: write_module(folder, name, text, force=force)


def _package_writer(folder: Path, force: bool) -> Callable[[str, str], Path]:
    from spdsl.cli.output import write_package
    from spdsl.codegen.standalone import standalone

    return lambda name, text: write_package(folder, name, standalone(text), force=force)


def _write(work: Sequence[Job], judged: Setting, folder: Path, write: Callable[[str, str], Path]) -> list[Path]:
    """Compiles all before it writes the first: an error leaves nothing behind."""
    from spdsl.cli.output import Foreign
    from spdsl.compiler import compile as compile_pattern

    _expect_apart(work)
    modules = [compile_pattern(task.source, task.name, task.params, judged) for task in work]
    written = []
    for task, module in zip(work, modules, strict=True):
        print_diagnostics(task.source, module.diagnostics)
        try:
            path = write(module.name, module.text)
        except Foreign as error:
            raise Failed(f"{error}; --force overwrites it") from None
        except OSError as error:
            raise Failed(f"cannot write to {folder}: {error.strerror or error}") from None
        written.append(path)
    return written


def _expect_apart(work: Sequence[Job]) -> None:
    """Each module has a file of its own, on systems that ignore case, too. A name twice in one source is its error."""
    names = [name for _, name in dict.fromkeys((task.source.path, task.name) for task in work)]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise Failed(f"two of the files hold a pattern `{twice}`; compile them into two folders")
    if len({name.lower() for name in names}) < len(names):
        raise Failed("two patterns differ in case only; their files would be one on many systems: use -p")
