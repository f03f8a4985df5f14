"""spelling: the names of a pattern while its module is written.

Templates print every name as a mark that no user text can hold. When the text is there, each name gets the spelling
that meets nothing around it (`chosen_names`): `near` as a rule, else `near_1`, `near_2`, ... The printed order of an
expression is that of the pattern's own names, so a spelling moves nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from spdsl.ir.pattern import Choice, Compress, Query, QueryCells, QueryTail, Softmax, Stream, Tensor, Term, Weight

T = TypeVar("T")

KEPT = ("q", "kv")  # predeclared: templates write them themselves
_INPUT_FIELDS: dict[type, tuple[str, ...]] = {
    Query: ("name",), QueryCells: ("source",), QueryTail: ("source",), Stream: ("name",), Tensor: ("name",),
    Choice: ("name",), Weight: ("name", "stream"), Compress: ("source", "logits"), Softmax: ("query", "sink"),
    Term: ("stream",),
}  # fmt: skip


class Spelling:
    """The marks of one pattern's names. `text`: the source, in which no mark can stand."""

    def __init__(self, text: str) -> None:
        self._mark = f"z{hashlib.sha256(text.encode()).hexdigest()[:12]}n"
        self._numbers: dict[tuple[str, str], int] = {}
        self.found = re.compile(rf"([zZ]){self._mark[1:]}(\d+)n")

    @property
    def names(self) -> list[str]:
        """The pattern's names by number."""
        return [name for _, name in self._numbers]

    def input(self, name: str) -> str:
        return name if name in KEPT else self._marked("input", name)

    def softmax(self, name: str, kind: str = "softmax") -> str:
        """Of a softmax, or of a `class` or `joint` whose name is made of one: it may be that of another binding."""
        return self._marked(kind, name)

    def of(self, value: T) -> T:
        """A part of the pattern or plan with marks for names. Tests keep theirs: `Reads` writes them."""
        return self._of(value)  # type: ignore[no-any-return]

    def written(self, text: str) -> str:
        """A text for people: with the pattern's own names."""
        return self.spelled(text, self.names)

    def spelled(self, text: str, names: list[str]) -> str:
        """The text with names for marks; a mark with a capital is the name of a class."""

        def name(mark: re.Match[str]) -> str:
            own = names[int(mark[2])]
            return own if mark[1] == "z" else camel(own)

        return self.found.sub(name, text)

    def marks(self, text: str) -> set[int]:
        """The numbers of the names in a text."""
        if self._mark[1:] not in text:
            return set()
        return {int(number) for _, number in self.found.findall(text)}

    def _marked(self, kind: str, name: str) -> str:
        return f"{self._mark}{self._numbers.setdefault((kind, name), len(self._numbers))}n"

    def _of(self, value: Any) -> Any:
        if isinstance(value, tuple) and not hasattr(value, "_fields"):
            return tuple(map(self._of, value))
        if not is_dataclass(value) or isinstance(value, type):
            return value
        marked = _INPUT_FIELDS.get(type(value), ())
        new: dict[str, Any] = {}
        for field in fields(value):
            old = getattr(value, field.name)
            spell: Callable[[Any], Any] = self.input if field.name in marked and old is not None else self._of
            if isinstance(value, Softmax) and field.name == "name":
                spell = self.softmax
            if (made := spell(old)) is not old:
                new[field.name] = made
        return replace(value, **new) if new else value


def camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))
