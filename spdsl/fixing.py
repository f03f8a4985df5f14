"""fixing: the hints that a machine may apply, applied to the text.

Text in, text out: who calls says what the findings about a text are. An edit for a warning is kept only if the text has
no error afterwards that it did not have before; one for an error may bring errors of later stages to light, but none of
its own kind. What is taken back is not tried again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from spdsl.diagnostics import Applicability, Diagnostic, Hint, Severity, Source, Span

ROUNDS = 10  # a fix may bring a finding of its own to light; more than a few in a row is no progress
ONE_BY_ONE = 8  # edits of a round that are tried alone, where all together made it worse: each is a check of the file
Check = Callable[[Source], Sequence[Diagnostic]]


@dataclass(frozen=True, slots=True)
class Edit:
    """`text` in place of what stands at `span`, because of the finding `code`."""

    span: Span
    text: str
    code: str


@dataclass(frozen=True, slots=True)
class Change:
    """An edit that was made: in a line of the text as it was at that time, the old words and the new ones."""

    code: str
    line: int
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Fixed:
    """The text with its changes, and what is left to say about it."""

    source: Source
    changes: tuple[Change, ...]
    left: tuple[Diagnostic, ...]


def fix(source: Source, check: Check) -> Fixed:
    """Applies hints until none is left, round by round; all of a round that do not overlap, together."""
    changes: list[Change] = []
    refused: set[tuple[str, str, str]] = set()  # (code, old words, new words) that were taken back
    diagnostics = tuple(check(source))
    for _ in range(ROUNDS):
        edits = [edit for edit in apart(edits_of(diagnostics)) if _words(source, edit) not in refused]
        if not edits:
            break
        together = applied(source, edits)
        after = tuple(check(together))
        if not any(_worse(edit.code, _errors(diagnostics), _errors(after)) for edit in edits):
            changes += [_change(source, edit) for edit in reversed(edits)]
            source, diagnostics = together, after
            continue
        for edit in reversed(edits[-ONE_BY_ONE:]):  # from the end on: what is before an edit keeps its place
            tried = applied(source, [edit])
            after = tuple(check(tried))
            if _worse(edit.code, _errors(diagnostics), _errors(after)):
                refused.add(_words(source, edit))
                continue
            changes.append(_change(source, edit))
            source, diagnostics = tried, after
    return Fixed(source, tuple(changes), diagnostics)


def _change(source: Source, edit: Edit) -> Change:
    line, _ = source.position(edit.span.start)
    return Change(edit.code, line, source.text[edit.span.start : edit.span.end], edit.text)


def edits_of(diagnostics: Iterable[Diagnostic]) -> list[Edit]:
    """The machine-applicable hints, each once, in the order of the text."""
    edits = [
        Edit(hint.span, hint.replacement, diagnostic.code)
        for diagnostic in diagnostics
        for hint in diagnostic.hints
        if applicable(hint) and hint.span is not None and hint.replacement is not None
    ]
    return sorted(dict.fromkeys(edits), key=lambda edit: (edit.span.start, edit.span.end, edit.text, edit.code))


def applicable(hint: Hint) -> bool:
    return hint.applicability is Applicability.MACHINE and hint.span is not None and hint.replacement is not None


def apart(edits: Sequence[Edit]) -> list[Edit]:
    """Those that touch no earlier one, in order. Two insertions at one place touch."""
    kept: list[Edit] = []
    for edit in edits:
        if not kept or edit.span.start > kept[-1].span.end or _behind(kept[-1].span, edit.span):
            kept.append(edit)
    return kept


def _behind(first: Span, second: Span) -> bool:
    """Whether the second begins where the first ends, both being more than a place."""
    return second.start == first.end and first.start < first.end and second.start < second.end


def applied(source: Source, edits: Sequence[Edit]) -> Source:
    """The text with edits that are apart, in order."""
    parts, end = [], 0
    for edit in edits:
        parts += [source.text[end : edit.span.start], edit.text]
        end = edit.span.end
    return Source("".join([*parts, source.text[end:]]), source.path)


def _errors(diagnostics: Iterable[Diagnostic]) -> Counter[str]:
    return Counter(diagnostic.code for diagnostic in diagnostics if diagnostic.severity is Severity.ERROR)


def _worse(code: str, before: Counter[str], after: Counter[str]) -> bool:
    return after[code] > before[code] if before[code] else bool(after - before)


def _words(source: Source, edit: Edit) -> tuple[str, str, str]:
    return edit.code, source.text[edit.span.start : edit.span.end], edit.text
