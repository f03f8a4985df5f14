"""`spdsl check`"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spdsl.cli.inputs import (
    STDIN,
    Failed,
    once,
    parameters,
    patterns_of,
    print_diagnostics,
    read_source,
    refuse_unheld,
)
from spdsl.cli.options import (
    LENGTHS,
    Definitions,
    allow_option,
    parameter_option,
    pattern_option,
    source_files,
    target_option,
)
from spdsl.diagnostics import Applicability, Diagnostic, Severity, Source, SpatError

if TYPE_CHECKING:
    from spdsl.checks.view import Setting
    from spdsl.fixing import Check, Fixed
    from spdsl.syntax.tree import PatternTree
    from spdsl.targets import Target

_EPILOG = """Exit codes: 0 nothing is wrong, 1 errors or warnings, 2 the command cannot be carried out.

\b
Example: spdsl check patterns/*.spat --target h200 --length 8k,64k
         cat near.spat | spdsl check - -D window=3k"""

Found = list[tuple[Source, Diagnostic]]


@click.command(short_help="Reports errors and warnings of .spat files.", epilog=_EPILOG)
@source_files
@pattern_option
@parameter_option
@target_option("A GPU that the kernels must fit, or several, each with --target")
@click.option(
    "--length", "lengths", type=LENGTHS, metavar="TOKENS",
    help="The lengths to judge by: 64k, or 8k,64k, or 4k..64k. In place of that of `expect`.",
)  # fmt: skip
@allow_option
@click.option("--fix", is_flag=True, help="Applies the hints that are safe to apply, and writes the files.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.pass_context
def check(
    context: click.Context,
    files: tuple[str, ...],
    pattern: str | None,
    definitions: Definitions,
    targets: tuple[Target, ...],
    lengths: tuple[int, ...] | None,
    allowed: tuple[str, ...],
    fix: bool,
    form: str,
) -> None:
    """Reports errors and warnings; exits with 1 if there are any. `-` as FILE is standard input."""
    from spdsl.rendering import as_data, summary

    if fix and STDIN in files:
        raise click.UsageError("--fix writes files, and standard input is none")
    told = _found(files, pattern, parameters(definitions), _settings(targets, lengths, allowed), fix)
    if form == "json":
        click.echo(json.dumps([as_data(source, diagnostic) for source, diagnostic in told], indent=2))
    else:
        for source, diagnostic in told:
            print_diagnostics(source, [diagnostic])
        click.echo(summary(diagnostic for _, diagnostic in told) or "no errors, no warnings", err=True)
    context.exit(int(any(diagnostic.severity is not Severity.NOTE for _, diagnostic in told)))


def _settings(targets: Sequence[Target], lengths: Sequence[int] | None, allowed: Sequence[str]) -> list[Setting]:
    from spdsl.checks.view import Setting

    return [Setting(tuple(targets), length, frozenset(allowed)) for length in lengths or (None,)]


def _found(
    files: Sequence[str], wanted: str | None, params: dict[str, Fraction], settings: Sequence[Setting], fix: bool
) -> Found:
    """What there is to say about each file, in the order of the files."""
    from spdsl.compiler import check as findings
    from spdsl.syntax.overrides import declared, shared

    opened = [_open(path, wanted) for path in once(files)]
    if wanted is not None and not any(file.patterns or file.failed for file in opened):
        refuse_unheld(wanted, [name for file in opened for name in file.names], files)
    given = shared([set().union(*map(declared, file.patterns)) for file in opened], params)
    told_of_all: Found = []
    for file, own in zip(opened, given, strict=True):

        def found_in(source: Source, own: dict[str, Fraction] = own) -> list[Diagnostic]:
            every = [told for judged in settings for told in findings(source, own, judged, wanted)]
            return list(dict.fromkeys(every))

        if file.text:
            source, ones = (
                _fixed(file.source, Path(file.path), found_in) if fix else (file.source, found_in(file.source))
            )
            told_of_all += [(source, told) for told in ones]
        else:
            told_of_all += [(file.source, told) for told in file.failed]
    return told_of_all


@dataclass(frozen=True, slots=True)
class _File:
    path: str
    source: Source
    names: tuple[str, ...] = ()
    """Of all its patterns."""
    patterns: tuple[PatternTree, ...] = ()
    """Those that are asked for."""
    failed: tuple[Diagnostic, ...] = ()
    """Why it does not parse."""
    text: bool = True


def _open(path: str, wanted: str | None) -> _File:
    try:
        source = read_source(path)
    except SpatError as error:
        return _File(path, error.source, failed=error.diagnostics, text=False)
    try:
        patterns = patterns_of(source)
    except SpatError as error:
        return _File(path, source, failed=error.diagnostics)
    names = tuple(tree.name.text for tree in patterns)
    return _File(path, source, names, tuple(tree for tree in patterns if wanted in (None, tree.name.text)))


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
    left = [
        diagnostic
        for diagnostic in done.left
        if any(hint.applicability is Applicability.MAYBE for hint in diagnostic.hints)
    ]
    if left:
        codes = ", ".join(dict.fromkeys(diagnostic.code for diagnostic in left))
        click.echo(f"{done.source.path}: left to you, as a fix may change what is meant: {codes}", err=True)
