"""What the commands share: files, parameters, printed diagnostics."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import click

from spdsl.diagnostics import Diagnostic, Source, SpatError

if TYPE_CHECKING:
    from spdsl.checks.view import Setting

Definitions = tuple[tuple[str, Fraction], ...]


class Failed(click.ClickException):
    """The command cannot be carried out; not the source's fault."""

    exit_code = 2


if TYPE_CHECKING:
    _ParamType = click.ParamType[tuple[str, Fraction]]
    _LengthType = click.ParamType[int]
    _CodeType = click.ParamType[str]
else:
    _ParamType = _LengthType = _CodeType = click.ParamType  # no generic class before click 8.4


class _Parameter(_ParamType):
    """`name=value`, the value a decimal number."""

    name = "name=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Fraction]:
        from spdsl.syntax.numbers import read_number

        name, equals, number = str(value).partition("=")
        if not equals or not name.strip().isidentifier():
            self.fail(f"`{value}` is not of the form name=value", param, ctx)
        try:
            return name.strip(), read_number(number.strip())
        except ValueError as reason:
            self.fail(f"`{value}`: {reason}", param, ctx)


class Length(_LengthType):
    """A number of tokens: `65536`, `64k`, `1M` (1024 of each)."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"([0-9]{1,10})([kKmM]?)", str(value).strip())
        tokens = int(found[1]) * {"": 1, "k": 1 << 10, "m": 1 << 20}[found[2].lower()] if found else 0
        if not 0 < tokens < 2**31:
            self.fail(f"`{value}` is no number of tokens below 2**31, such as 65536, 64k or 1M", param, ctx)
        return tokens


class _Code(_CodeType):
    """The code of a warning."""

    name = "code"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from spdsl.catalogue import entries
        from spdsl.diagnostics import did_you_mean

        code = str(value).upper()
        warnings = [known for known in entries() if known.startswith("W")]
        if code in warnings:
            return code
        near = did_you_mean(code, warnings)
        reason = "is an error; only warnings can be allowed" if code in entries() else "is no code of a warning"
        self.fail(f"{value} {reason}{f'; {near.text}' if near and code not in entries() else ''}", param, ctx)


source_file = click.argument("file", type=click.Path(exists=True, dir_okay=False))
pattern_option = click.option("-p", "--pattern", metavar="NAME", help="Only this pattern of the file.")
parameter_option = click.option(
    "-D", "--define", "definitions", type=_Parameter(), multiple=True, help="Overrides a `param` of the pattern."
)


length_option = click.option(
    "--length", type=Length(), metavar="TOKENS", help="The length to judge by, such as 64k; else that of `expect`."
)
allow_option = click.option(
    "--allow", "allowed", type=_Code(), multiple=True, metavar="CODE", help="A warning that is not told, such as W501."
)


def setting(targets: Sequence[str], length: int | None, allowed: Sequence[str]) -> Setting:
    """What patterns are judged by. Raises a usage error for an unknown GPU."""
    from spdsl.checks.view import Setting
    from spdsl.targets import find

    try:
        return Setting(tuple(find(name) for name in targets), length, frozenset(allowed))
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def parameters(definitions: Definitions) -> dict[str, Fraction]:
    """The overrides as a table; one given twice is a usage error."""
    table = dict(definitions)
    if len(table) < len(definitions):
        raise click.UsageError("a parameter is defined twice")
    return table


def read_source(path: str) -> Source:
    from spdsl.syntax.read import read

    try:
        return read(path)
    except OSError as error:
        raise Failed(f"cannot read {path}: {error.strerror or error}") from None


def pattern_names(source: Source, wanted: str | None) -> list[str]:
    """The patterns to work on. Raises SpatError if the file does not parse."""
    from spdsl.diagnostics import Report
    from spdsl.syntax.parse import parse

    report = Report(source)
    names = [pattern.name.text for pattern in parse(source, report).patterns]
    report.check()
    if wanted is None:
        return names
    if wanted not in names:
        raise click.UsageError(f"{source.path} holds no pattern `{wanted}`; it holds {', '.join(names)}")
    return [wanted]


def print_diagnostics(source: Source, diagnostics: Iterable[Diagnostic]) -> None:
    """On standard error, in colour if it is a terminal and NO_COLOR is not set."""
    from rich.console import Console

    from spdsl.rendering import render

    console = Console(stderr=True, highlight=False, emoji=False, markup=False)
    for found in diagnostics:
        console.print(render(source, found), soft_wrap=True)


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
