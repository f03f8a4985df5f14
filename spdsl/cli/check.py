"""`spdsl check`"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spdsl.cli.inputs import (
    Definitions,
    Failed,
    allow_option,
    length_option,
    parameter_option,
    parameters,
    print_diagnostics,
    read_source,
    setting,
)
from spdsl.diagnostics import Applicability, Diagnostic, Severity, Source, SpatError

if TYPE_CHECKING:
    from spdsl.fixing import Check, Fixed


@click.command()
@click.argument("files", type=click.Path(exists=True, dir_okay=False), nargs=-1, required=True, metavar="FILE...")
@parameter_option
@click.option("--target", "targets", multiple=True, metavar="NAME", help="A GPU that the kernels must fit, as h200.")
@length_option
@allow_option
@click.option("--fix", is_flag=True, help="Applies the hints that are safe to apply, and writes the files.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.pass_context
def check(
    context: click.Context,
    files: tuple[str, ...],
    definitions: Definitions,
    targets: tuple[str, ...],
    length: int | None,
    allowed: tuple[str, ...],
    fix: bool,
    form: str,
) -> None:
    """Reports errors and warnings; exits with 1 if there are any."""
    from spdsl.compiler import check as findings
    from spdsl.rendering import as_data, summary

    params, judged = parameters(definitions), setting(targets, length, allowed)

    def found_in(source: Source) -> list[Diagnostic]:
        return list(findings(source, params, judged))

    found = [(source, one) for path in files for source, ones in [_findings(path, found_in, fix)] for one in ones]
    if form == "json":
        click.echo(json.dumps([as_data(source, one) for source, one in found], indent=2))
    else:
        for source, one in found:
            print_diagnostics(source, [one])
        click.echo(summary(one for _, one in found) or "no errors, no warnings", err=True)
    context.exit(int(any(one.severity is not Severity.NOTE for _, one in found)))


def _findings(path: str, found_in: Check, fix: bool) -> tuple[Source, Iterable[Diagnostic]]:
    try:
        source = read_source(path)
        return _fixed(source, Path(path), found_in) if fix else (source, found_in(source))
    except SpatError as error:
        return error.source, error.diagnostics


def _fixed(source: Source, path: Path, found_in: Check) -> tuple[Source, Iterable[Diagnostic]]:
    """Writes the fixed text, if it is another one, and says what was done and what was not."""
    from spdsl.cli.output import rewrite
    from spdsl.fixing import fix

    done = fix(source, found_in)
    if done.changes:
        try:
            rewrite(path, source.text, done.source.text)
        except OSError as error:
            raise Failed(f"cannot write {path}: {error.strerror or error}") from None
    _tell(done)
    return done.source, done.left


def _tell(done: Fixed) -> None:
    from spdsl.rendering import visible

    for change in done.changes:
        place, old, new = f"{done.source.path}:{change.line}", visible(change.old), visible(change.new)
        click.echo(f"{place}: {change.code} fixed: `{old}` -> `{new}`", err=True)
    left = [one for one in done.left if any(hint.applicability is Applicability.MAYBE for hint in one.hints)]
    if left:
        codes = ", ".join(dict.fromkeys(one.code for one in left))
        click.echo(f"{done.source.path}: left to you, as a fix may change what is meant: {codes}", err=True)
