"""What the commands share: sources, their patterns and parameters, printed diagnostics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, NoReturn

import click

from spdsl.cli.options import Definitions
from spdsl.diagnostics import Diagnostic, Source, SpatError

if TYPE_CHECKING:
    from spdsl.syntax.tree import PatternTree

STDIN = "-"
_STDIN_NAME = "<stdin>"


class Failed(click.ClickException):
    """The command cannot be carried out; not the source's fault."""

    exit_code = 2


def parameters(definitions: Definitions) -> dict[str, Fraction]:
    """The overrides as a table; one given twice is a usage error."""
    table = dict(definitions)
    if len(table) < len(definitions):
        raise click.UsageError("a parameter is defined twice")
    return table


def read_source(path: str) -> Source:
    """The source in a file, or on standard input for `-`."""
    from spdsl.limits import SOURCE_BYTES
    from spdsl.syntax.read import decode, read

    try:
        if path == STDIN:
            return decode(click.open_file(STDIN, "rb").read(SOURCE_BYTES + 1), _STDIN_NAME)
        return read(path)
    except OSError as error:
        raise Failed(f"cannot read {path}: {error.strerror or error}") from None


def once(paths: Sequence[str]) -> list[str]:
    """The files of a command, one that is given twice once; standard input too, of which the second would be empty."""
    return list(dict.fromkeys(paths))


@dataclass(frozen=True, slots=True)
class Job:
    """A pattern to work on."""

    source: Source
    name: str
    params: dict[str, Fraction]


def jobs(sources: Sequence[Source], wanted: str | None, definitions: Definitions) -> list[Job]:
    """The patterns of the files, or those of that name, each with the overrides of the parameters that it has.

    Raises SpatError if a file does not parse, a usage error if none holds the pattern.
    """
    from spdsl.syntax.overrides import divided

    held = [(source, tree) for source in sources for tree in patterns_of(source)]
    asked = [(source, tree) for source, tree in held if wanted in (None, tree.name.text)]
    if wanted is not None and not asked:
        refuse_unheld(wanted, [tree.name.text for _, tree in held], [source.path for source in sources])
    every = divided([tree for _, tree in asked], parameters(definitions))
    return [Job(source, tree.name.text, params) for (source, tree), params in zip(asked, every, strict=True)]


def patterns_of(source: Source) -> tuple[PatternTree, ...]:
    """What the file holds. Raises SpatError if it does not parse."""
    from spdsl.diagnostics import Report
    from spdsl.syntax.parse import parse

    report = Report(source)
    patterns = parse(source, report).patterns
    report.check()
    return patterns


def refuse_unheld(wanted: str, known: Sequence[str], paths: Sequence[str]) -> NoReturn:
    """The usage error where no file holds the pattern."""
    alone = len(paths) == 1
    raise click.UsageError(
        f"{', '.join(paths)} {'holds' if alone else 'hold'} no pattern `{wanted}`; "
        f"{'it holds' if alone else 'they hold'} {', '.join(known)}"
    )


def print_diagnostics(source: Source, diagnostics: Iterable[Diagnostic]) -> None:
    """On standard error, in colour if it is a terminal and NO_COLOR is not set."""
    from rich.console import Console

    from spdsl.rendering import render

    console = Console(stderr=True, highlight=False, emoji=False, markup=False)
    for diagnostic in diagnostics:
        console.print(render(source, diagnostic), soft_wrap=True)


@contextmanager
def diagnostics_end_it() -> Iterator[None]:
    """Prints the diagnostics of a SpatError and ends the command with 1."""
    try:
        yield
    except SpatError as error:
        from spdsl.rendering import summary

        print_diagnostics(error.source, error.diagnostics)
        click.echo(summary(error.diagnostics), err=True)
        raise click.exceptions.Exit(1) from None
