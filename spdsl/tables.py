"""Tables that never cut a number: where there is no room for all columns, the least important ones are left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

Cell = Text | str
_BORDER = 3  # columns of the terminal: a line and two spaces for each column; one more line at the end


@dataclass(slots=True)
class Column:
    heading: str
    means: str = ""
    """A few words for the legend."""
    spare: int = 0
    """0: always shown. Else the columns with the smallest numbers come first, as far as there is room."""
    words: bool = False
    """At the left; may be broken into lines where even the columns that are always shown have no room."""
    apart: bool = False
    """Where there is no room, its cells become headings above the rows that have them in common."""
    cells: list[Text] = field(default_factory=list)

    @property
    def width(self) -> int:
        return max(map(cell_len, [self.heading, *(cell.plain for cell in self.cells)]))

    @property
    def empty(self) -> bool:
        """Whether it says nothing."""
        return self.spare > 0 and not any(cell.plain for cell in self.cells)


class Fitted:
    """A table for a console of any width from 60 on. `notes` stand below it, then the legend, if it has its own."""

    def __init__(self, title: str, columns: Iterable[Column], legend: bool = True) -> None:
        self.title, self.columns, self.legend = title, list(columns), legend
        self.notes: list[Text] = []

    def add_row(self, *cells: Cell) -> None:
        for column, cell in zip(self.columns, cells, strict=True):
            column.cells.append(cell if isinstance(cell, Text) else Text(cell))

    def shown(self, width: int) -> list[Column]:
        """The columns for which there is room, in their order."""
        chosen = [column for column in self.columns if not column.spare]
        spare = [column for column in self.columns if column.spare and not column.empty]
        for column in sorted(spare, key=lambda column: column.spare):
            if _width([*chosen, column]) <= width:
                chosen.append(column)
        return [column for column in self.columns if column in chosen]

    def left_out(self, width: int) -> list[Column]:
        """What a wider console would show."""
        shown = self.shown(width)
        return [column for column in self.columns if column not in shown and not column.apart and not column.empty]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        shown = self.shown(options.max_width)
        apart = [column for column in self.columns if column.apart and column not in shown]
        yield Text(self.title, "italic")
        rows = range(len(self.columns[0].cells))
        for heading, group in groupby(rows, lambda row: _heading(apart, row)):
            if heading:
                yield Text(heading, "bold")
            yield _table(shown, list(group))
        yield from self.notes
        if self.legend:
            yield Legend([self])


class Legend:
    """What the headings of some tables mean, and what a wider console would show."""

    def __init__(self, tables: Sequence[Fitted]) -> None:
        self.tables = tables

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        width = options.max_width
        shown = [column for table in self.tables for column in table.shown(width)]
        meant = dict.fromkeys(f"{column.heading}: {column.means}" for column in shown if column.means)
        if meant:
            yield Text("; ".join(meant), "dim")
        left = dict.fromkeys(column.heading for table in self.tables for column in table.left_out(width))
        if left:
            yield Text(f"no room for: {', '.join(left)} (a wider terminal has, COLUMNS=200, and JSON)", "dim")


def _width(columns: Sequence[Column]) -> int:
    return sum(column.width + _BORDER for column in columns) + 1


def _heading(apart: Sequence[Column], row: int) -> str:
    return ", ".join(column.cells[row].plain for column in apart if column.cells[row].plain)


def _table(columns: Sequence[Column], rows: Sequence[int]) -> Table:
    table = Table()
    for column in columns:
        table.add_column(
            column.heading, justify="left" if column.words else "right", overflow="fold",
            no_wrap=not column.words, min_width=None if column.words else column.width,
            width=None if column.words else column.width,
        )  # fmt: skip
    for row in rows:
        table.add_row(*(column.cells[row] for column in columns))
    return table
