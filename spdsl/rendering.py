"""Draws diagnostics: for people with the lines they are about, for programs as plain data."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator

from rich.cells import cell_len
from rich.text import Text

from spdsl.catalogue import entries
from spdsl.diagnostics import Diagnostic, Hint, Severity, Source, Span

_STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "bold yellow", Severity.NOTE: "bold cyan"}
_GUTTER = "bold blue"
_TAB = 4
_AROUND = 60  # characters shown at either side of a span in a line too long for a screen
_LONG_LINE = 160


def render(source: Source, diagnostic: Diagnostic) -> Text:
    """One diagnostic with its lines of the source; ends with a line feed."""
    style = _STYLES[diagnostic.severity]
    text = Text()
    text.append(f"{diagnostic.severity.value}[{diagnostic.code}]", style)
    text.append(f": {visible(diagnostic.message)}\n", "bold")
    width = _gutter_width(source, diagnostic)
    if diagnostic.span is None:
        text.append(f"{' ' * width}--> ", _GUTTER).append(f"{visible(source.path)}\n")
    else:
        row, column = source.position(diagnostic.span.start)
        text.append(f"{' ' * width}--> ", _GUTTER).append(f"{visible(source.path)}:{row}:{column}\n")
        text.append(f"{' ' * width} |\n", _GUTTER)
        _append_span(text, source, diagnostic.span, diagnostic.label, width, style)
    notes = [("note", note) for note in diagnostic.notes]
    if diagnostic.span is None and diagnostic.label:
        notes.insert(0, ("note", diagnostic.label))
    if diagnostic.span is not None and (notes or diagnostic.hints):
        text.append(f"{' ' * width} |\n", _GUTTER)
    for kind, words in [*notes, *(("hint", hint.text) for hint in diagnostic.hints)]:
        text.append(f"{' ' * width} = ", _GUTTER).append(f"{kind}: ", "bold").append(f"{visible(words)}\n")
    for hint in diagnostic.hints:
        _append_replacement(text, source, hint, width)
    return text


def summary(diagnostics: Iterable[Diagnostic]) -> str:
    """`2 errors, 1 warning`; empty if there is nothing to count."""
    severities = [diagnostic.severity for diagnostic in diagnostics]
    counts = [(severities.count(severity), severity.value) for severity in Severity]
    return ", ".join(f"{count} {word}{'s' if count > 1 else ''}" for count, word in counts if count)


def as_data(source: Source, diagnostic: Diagnostic) -> dict[str, object]:
    """One diagnostic as JSON types. Rows and columns count from 1, end columns point behind the last character."""
    span = diagnostic.span or Span(0, 0)
    entry = entries().get(diagnostic.code)
    return {
        "code": diagnostic.code,
        "name": entry.name if entry else None,
        "severity": diagnostic.severity.value,
        "message": diagnostic.message,
        "label": diagnostic.label,
        "filename": source.path,
        "location": _location(source, span.start),
        "end_location": _location(source, span.end),
        "notes": list(diagnostic.notes),
        "hints": [_hint_data(source, hint) for hint in diagnostic.hints],
    }


def _hint_data(source: Source, hint: Hint) -> dict[str, object]:
    edits: list[dict[str, object]] = []
    if hint.span is not None and hint.replacement is not None:
        ends = {
            "location": _location(source, hint.span.start),
            "end_location": _location(source, hint.span.end),
        }
        edits.append({"content": hint.replacement, **ends})
    return {"message": hint.text, "applicability": hint.applicability.value, "edits": edits}


def _location(source: Source, offset: int) -> dict[str, int]:
    row, column = source.position(offset)
    return {"row": row, "column": column}


def _gutter_width(source: Source, diagnostic: Diagnostic) -> int:
    last = diagnostic.span.end if diagnostic.span else 0
    edits = [
        (hint.span.end, hint.replacement) for hint in diagnostic.hints if hint.span and hint.replacement is not None
    ]
    rows = [source.position(end)[0] + text.count("\n") for end, text in [(last, ""), *edits]]
    return len(str(max(rows)))


def _append_span(text: Text, source: Source, span: Span, label: str, width: int, style: str) -> None:
    """The first line of the span, underlined; of a longer one the last line too."""
    row, column = source.position(span.start)
    last_row, last_column = source.position(span.end)
    line = source.line(row)
    end = last_column if last_row == row else max(len(line) + 1, column + 1)
    _append_line(text, line, row, width, (column - 1, end - 1), "" if last_row > row else label, style)
    if last_row > row:
        if last_row > row + 1:
            text.append("...\n", _GUTTER)
        last = source.line(last_row)
        start = len(last) - len(last.lstrip())
        _append_line(text, last, last_row, width, (start, last_column - 1), label, style)


def _append_line(text: Text, line: str, row: int, width: int, part: tuple[int, int], label: str, style: str) -> None:
    line = line.rstrip("\r")
    shown, start, end = _cropped(line, *part)
    text.append(f"{row:>{width}} | ", _GUTTER).append(f"{visible(shown)}\n")
    indent = cell_len(visible(shown[:start]))
    carets = max(cell_len(visible(shown[:end])) - indent, 1)
    text.append(f"{' ' * width} | ", _GUTTER).append(f"{' ' * indent}")
    text.append(f"{'^' * carets}{' ' + visible(label) if label else ''}\n", style)


def _cropped(line: str, start: int, end: int) -> tuple[str, int, int]:
    """The part of a long line around `start`, with the place of the span in it."""
    if len(line) <= _LONG_LINE:
        return line, start, end
    first = max(start - _AROUND, 0)
    last = min(start + _AROUND, len(line))
    before, behind = "..." if first else "", "..." if last < len(line) else ""
    shift = len(before) - first
    return f"{before}{line[first:last]}{behind}", start + shift, min(end, last) + shift


def _append_replacement(text: Text, source: Source, hint: Hint, width: int) -> None:
    """The line as it is and as it would be."""
    if hint.span is None or hint.replacement is None:
        return
    row, column = source.position(hint.span.start)
    old = source.line(row).rstrip("\r")
    if hint.span.end - hint.span.start > len(old) - column + 1 or len(old) > _LONG_LINE:
        return  # more than one line: the words have to do
    new = f"{old[: column - 1]}{hint.replacement}{old[column - 1 + hint.span.end - hint.span.start :]}"
    text.append(f"{' ' * width} |\n", _GUTTER)
    text.append(f"{row:>{width}} ", _GUTTER).append(f"- {visible(old)}\n", "red")
    for i, line in enumerate(new.split("\n"), start=row):
        text.append(f"{i:>{width}} ", _GUTTER).append(f"+ {visible(line)}\n", "green")


def visible(text: str) -> str:
    """The text with tabs expanded and everything that could steer a terminal spelled out."""
    return "".join(_visible_characters(text))


def _visible_characters(text: str) -> Iterator[str]:
    cells = 0
    for character in text:
        shown = _shown(character, cells)
        cells += cell_len(shown)
        yield shown


def _shown(character: str, cells: int) -> str:
    if character == "\t":
        return " " * (_TAB - cells % _TAB)
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return f"<U+{ord(character):04X}>"
    return character
