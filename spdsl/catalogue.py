"""The texts behind the codes: `explain("E101")`."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Entry:
    """One code. `bad` raises it (the text is to be repeated `repeated` times), `fixed` does not."""

    code: str
    name: str
    title: str
    text: str
    bad: str
    fixed: str
    repeated: int = 1


@cache
def entries() -> dict[str, Entry]:
    """All codes in the order of the file."""
    table = tomllib.loads(Path(__file__).with_name("catalogue.toml").read_text(encoding="utf-8"))
    return {code: Entry(code=code, **fields) for code, fields in table.items()}


def explain(code: str) -> Entry:
    """The entry of a code, in either case.

    Raises KeyError if there is none.
    """
    return entries()[code.upper()]
