"""`spdsl check`"""

from __future__ import annotations

import json

import click

from spdsl.cli.inputs import Definitions, parameter_option, parameters, print_diagnostics, read_source
from spdsl.diagnostics import Diagnostic, Severity, Source, SpatError


@click.command()
@click.argument("files", type=click.Path(exists=True, dir_okay=False), nargs=-1, required=True, metavar="FILE...")
@parameter_option
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.pass_context
def check(context: click.Context, files: tuple[str, ...], definitions: Definitions, form: str) -> None:
    """Reports errors and warnings; exits with 1 if there are any."""
    from spdsl.rendering import as_data, summary

    found = [(source, one) for path in files for source, ones in [_findings(path, definitions)] for one in ones]
    if form == "json":
        click.echo(json.dumps([as_data(source, one) for source, one in found], indent=2))
    else:
        for source, one in found:
            print_diagnostics(source, [one])
        click.echo(summary(one for _, one in found) or "no errors, no warnings", err=True)
    context.exit(int(any(one.severity is not Severity.NOTE for _, one in found)))


def _findings(path: str, definitions: Definitions) -> tuple[Source, list[Diagnostic]]:
    from spdsl.compiler import check as findings

    try:
        source = read_source(path)
        return source, list(findings(source, parameters(definitions)))
    except SpatError as error:
        return error.source, list(error.diagnostics)
