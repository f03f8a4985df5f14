"""mistake_table: the mistakes of `grammar/mistakes.toml`, and by what an error is known to be one of them.

The file shows each mistake by examples; an error gets the name of the example that fails in the same way: with the same
tokens expected and the same token found.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from lark import UnexpectedToken

from spdsl import resources
from spdsl.syntax.failure import Failure
from spdsl.syntax.grammar import ALIEN, END, fresh_parser, tokens


@dataclass(frozen=True, slots=True)
class Mistake:
    """One entry of mistakes.toml. In `message`, `{found}` and `{before}` stand for the tokens at the place."""

    name: str
    message: str
    hint: str
    place: str  # "found": at the token; "gap": behind the token before it
    replacement: str | None
    examples: tuple[str, ...]


Signature = tuple[frozenset[str], str, str]


def mistakes() -> tuple[Mistake, ...]:
    """All named mistakes, in the order of the file."""
    entries = tomllib.loads(resources.text("grammar", "mistakes.toml"))
    return tuple(
        Mistake(
            entry["name"],
            entry["message"],
            entry.get("hint", ""),
            entry.get("place", "found"),
            entry.get("replacement"),
            tuple(entry["examples"]),
        )
        for entry in entries["mistake"]
    )


def signatures(mistake: Mistake) -> Iterator[Signature]:
    """How the examples of a mistake fail; ValueError if one does not, for then it teaches nothing."""
    for example in mistake.examples:
        failure = _first_failure(example)
        if failure is None:
            raise ValueError(f"mistakes.toml: an example of {mistake.name} is no mistake: {example}")
        yield signature(failure)


@cache
def table() -> dict[Signature, Mistake]:
    return {shape: mistake for mistake in mistakes() for shape in signatures(mistake)}


def _first_failure(text: str) -> Failure | None:
    parser = fresh_parser()
    previous = None
    stream = tokens(text)
    for token, following in zip(stream, [*stream[1:], stream[-1]], strict=True):
        try:
            parser.feed_token(token)
        except UnexpectedToken as error:
            return Failure(frozenset(error.expected), token, following, previous)
        previous = token
    return None


def signature(failure: Failure) -> Signature:
    kind = failure.found.type
    if kind in ALIEN:  # wrong wherever it stands
        return frozenset(), kind, "" if kind == "MALFORMED" else str(failure.found)
    if kind == "NAME" and failure.expected == {"PATTERN", END}:  # a header without its keyword, or a stray item
        return failure.expected, kind, failure.following.type
    return failure.expected, kind, str(failure.found) if kind == "COMPARE" else ""
