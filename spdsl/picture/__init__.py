"""show: which keys each query of a pattern sees, as a terminal picture or a PNG."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spdsl.diagnostics import Report, Source

if TYPE_CHECKING:
    from spdsl.ir.pattern import Pattern
    from spdsl.syntax.tree import PatternTree

LONGEST = 8192


class CannotDraw(click.ClickException):
    """The picture cannot be made; not the pattern's fault."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Drawn:
    """A pattern, and what it is with another value of a parameter; None if it cannot have that."""

    pattern: Pattern
    varied: Callable[[str, Fraction], Pattern | None]


def show(
    source: Source,
    pattern: str | None,
    params: Mapping[str, Fraction],
    length: int | None = None,
    output: str | None = None,
) -> None:
    """Draws the patterns of a source, or the one named, for `length` queries and keys: on the terminal, or as a PNG.

    Without `length` each has that of `spdsl.picture.lengths.usual`. Below a picture in which nothing is hidden stands
    what would show more. Raises SpatError if the source has errors, CannotDraw if the length is out of range, the
    pattern is not there, or the file cannot be written.
    """
    if length is not None and not 1 <= length <= LONGEST:
        reason = f"a picture is drawn for 1 to {LONGEST} keys, not {length}; the mask of fewer looks the same"
        raise CannotDraw(f"--length: {reason}")
    drawn = list(_patterns(source, pattern, params))
    if output is not None and len(drawn) > 1:
        names = ", ".join(found.pattern.name for found in drawn)
        raise CannotDraw(f"{source.path} holds several patterns, {names}: choose one with -p")
    from spdsl.picture.lengths import advice, usual
    from spdsl.picture.terminal import draw

    for found in drawn:
        tokens = length or usual(found.pattern)
        if output is None:
            draw(found.pattern, tokens)
        else:
            _write(found.pattern, tokens, Path(output))
        if told := advice(found, tokens):
            click.echo(told, err=output is not None)


def _patterns(source: Source, wanted: str | None, params: Mapping[str, Fraction]) -> Iterator[Drawn]:
    from spdsl.passes.lower import lower
    from spdsl.syntax.overrides import divided
    from spdsl.syntax.parse import parse

    report = Report(source)
    trees = parse(source, report).patterns
    report.check()
    names = [tree.name.text for tree in trees]
    if wanted is not None and wanted not in names:
        raise CannotDraw(f"{source.path} holds no pattern `{wanted}`; it holds {', '.join(names)}")
    asked = [tree for tree in trees if wanted in (None, tree.name.text)]
    for tree, own in zip(asked, divided(asked, params), strict=True):
        lowered = lower(tree, report, own)
        report.check()
        assert lowered is not None

        def varied(
            name: str, value: Fraction, tree: PatternTree = tree, own: dict[str, Fraction] = own
        ) -> Pattern | None:
            found = lower(tree, trial := Report(source), own | {name: value})
            return None if trial.failed else found

        yield Drawn(lowered, varied)


def _write(pattern: Pattern, length: int, path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise CannotDraw(f"{path}: the picture is a PNG, name it .png")
    try:
        from spdsl.picture.plot import save
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "matplotlib":
            raise
        raise CannotDraw("a PNG needs matplotlib: pip install 'spdsl[pictures]'") from None
    try:
        save(pattern, length, path)
    except OSError as error:
        raise CannotDraw(f"cannot write {path}: {error.strerror or error}") from None
    click.echo(path.as_posix())


def heading(pattern: Pattern) -> str:
    """The parameters of a pattern in one line."""
    return ", ".join(f"{name} = {value}" for name, value in pattern.params)


def percent(share: float) -> str:
    """`12%`, with a decimal where a whole number would hide that it is not 0 or 100."""
    return f"{share:.1%}" if 0 < share < 0.01 or 0.99 < share < 1 else f"{share:.0%}"
