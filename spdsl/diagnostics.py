"""What the compiler tells the user: a code, a place, the reason, and the way out.

Every stage collects its diagnostics in a `Report` and goes on where it can, so that one run shows all errors
of a file. The texts behind the codes are in `catalogue.toml`; drawing them is `rendering.py`'s work.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from enum import Enum
from itertools import takewhile

from spdsl.budget import spend

MOST_ERRORS = 100  # more than a reader can use; the rest is counted only
NEAR = 0.6  # of the letters of two words are alike where one may be meant for the other
LEAST_STEM = 3  # letters of an abbreviation


@dataclass(frozen=True, slots=True)
class Span:
    """A half-open range of characters of the source: `text[start:end]`."""

    start: int
    end: int

    def to(self, other: Span) -> Span:
        return Span(self.start, other.end)


class Severity(Enum):
    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


class Applicability(Enum):
    """How far a hint's replacement can be trusted (rustc's scale)."""

    MACHINE = "machine-applicable"
    MAYBE = "maybe-incorrect"
    UNSPECIFIED = "unspecified"


@dataclass(frozen=True, slots=True)
class Hint:
    """A way out in words; with `replacement`, the text that would stand at `span` instead."""

    text: str
    applicability: Applicability = Applicability.UNSPECIFIED
    span: Span | None = None
    replacement: str | None = None


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One finding. `message` is a sentence without a full stop, `label` stands beside the carets."""

    code: str
    message: str
    span: Span | None = None
    label: str = ""
    notes: tuple[str, ...] = ()
    hints: tuple[Hint, ...] = ()
    severity: Severity = Severity.ERROR


@dataclass(frozen=True, slots=True)
class Source:
    """The text of one `.spat` file and the name it is shown under."""

    text: str
    path: str = "<text>"

    def position(self, offset: int) -> tuple[int, int]:
        """Line and column of a character, both counted from 1."""
        before = self.text[:offset]
        return before.count("\n") + 1, offset - (before.rfind("\n") + 1) + 1

    def line(self, number: int) -> str:
        return self.text.split("\n")[number - 1]


class SpatError(Exception):
    """The source cannot be compiled; `diagnostics` says why, all findings of the run in source order."""

    def __init__(self, source: Source, diagnostics: Iterable[Diagnostic]) -> None:
        self.source = source
        self.diagnostics = tuple(diagnostics)
        super().__init__("\n".join(self._lines()))

    def _lines(self) -> Iterable[str]:
        for diagnostic in self.diagnostics:
            line, column = self.source.position(diagnostic.span.start) if diagnostic.span else (1, 1)
            place, severity = f"{self.source.path}:{line}:{column}", diagnostic.severity.value
            yield f"{place}: {severity}[{diagnostic.code}]: {diagnostic.message}"


@dataclass(slots=True)
class Report:
    """Collects the findings of a run. Warnings with one of the `allowed` codes are not told."""

    source: Source
    diagnostics: list[Diagnostic] = field(default_factory=list)
    allowed: set[str] = field(default_factory=set)

    def add(self, diagnostic: Diagnostic) -> None:
        if len(self.diagnostics) < MOST_ERRORS and diagnostic not in self.diagnostics:
            self.diagnostics.append(diagnostic)

    def error(
        self, code: str, message: str, span: Span | None, label: str = "", *, note: str = "", hint: str | Hint = ""
    ) -> None:
        self._tell(Severity.ERROR, code, message, span, label, note, hint)

    def warning(
        self, code: str, message: str, span: Span | None, label: str = "", *, note: str = "", hint: str | Hint = ""
    ) -> None:
        self._tell(Severity.WARNING, code, message, span, label, note, hint)

    def _tell(
        self, severity: Severity, code: str, message: str, span: Span | None, label: str, note: str, hint: str | Hint
    ) -> None:
        hints = (Hint(hint),) if isinstance(hint, str) and hint else (hint,) if isinstance(hint, Hint) else ()
        self.add(Diagnostic(code, message, span, label, (note,) if note else (), hints, severity))

    def told(self) -> list[Diagnostic]:
        """What is to be shown, in source order."""
        told = [
            diagnostic
            for diagnostic in self.diagnostics
            if diagnostic.severity is not Severity.WARNING or diagnostic.code not in self.allowed
        ]
        return sorted(told, key=lambda diagnostic: diagnostic.span.start if diagnostic.span else 0)

    @property
    def failed(self) -> bool:
        return any(diagnostic.severity is Severity.ERROR for diagnostic in self.diagnostics)

    def check(self) -> None:
        """Raises if any error was found."""
        if self.failed:
            raise SpatError(self.source, self.told())


def did_you_mean(word: str, candidates: Iterable[str], span: Span | None = None) -> Hint | None:
    """The nearest known word, or nothing if none is near: most letters alike, then the longest common beginning."""
    matcher = SequenceMatcher(b=word.casefold())  # keeps what it learns of `b`
    nearest, best = "", 0.0
    every = sorted(candidates)
    spend(len(every) * (1 + len(word) // 8))
    for known in every:
        pairs = zip(word.casefold(), known.casefold(), strict=False)
        stem = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        begins = stem >= LEAST_STEM and stem == min(len(word), len(known))
        matcher.set_seq1(known.casefold())
        bounds = (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio)  # cheap ones first
        if begins or all(alike() >= NEAR for alike in bounds):
            score = matcher.ratio() + stem / max(len(word), len(known))
            nearest, best = (known, score) if score > best else (nearest, best)
    return Hint(f"did you mean `{nearest}`?", Applicability.MAYBE, span, nearest) if nearest else None
