"""What a word of the language is: its parameters, what it makes, and how.

The grammar knows no word by name. The lowering looks a call up in the registry, evaluates each argument as the kind
that its parameter asks for, and calls `build`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from spdsl.diagnostics import Span
from spdsl.ir.pattern import Branch, Input, Query, Stream, Tensor
from spdsl.ir.symbols import Boolean


class Kind(Enum):
    """What an argument is evaluated to, or what a word makes."""

    SIZE = "a size"  # compile-time integer
    NUMBER = "a number"  # compile-time real, exact
    ELEMENT = "an element expression"  # over q, k, h, length and tensor reads
    CONDITION = "a condition"  # Boolean over the same
    SET = "a set"
    STREAM = "a stream"
    QUERY = "a query"
    TENSOR = "a tensor"
    BRANCH = "a branch"
    AXIS = "an axis"  # a size, or one of the words head, kv_head, query, token
    CHOICE = "one of its words"  # one of Parameter.words


class Required:
    """The default of a parameter that has none."""


REQUIRED = Required()


@dataclass(frozen=True, slots=True)
class Parameter:
    """`least` bounds a SIZE or NUMBER, `words` lists what a CHOICE may be, `many` takes all that follow."""

    name: str
    kind: Kind
    default: object = REQUIRED
    least: int | None = None
    words: tuple[str, ...] = ()
    many: bool = False


@dataclass(frozen=True, slots=True)
class SetValue:
    """A set: for each stream (None: not placed on one yet) the test that its entries pass."""

    parts: tuple[tuple[str | None, Boolean], ...]


Value = SetValue | Stream | Query | Tensor | Branch


@dataclass(slots=True)
class Scope:
    """What `build` may ask of its surroundings: the name it is bound to, and a place for new inputs."""

    name: str  # the binding's name, or one made from the word
    span: Span
    inputs: list[Input]
    query_heads: int | None
    kv_heads: int | None
    causal: bool
    refuse: Callable[[str, str, str], None]  # (code, message, hint): reports an error at the call

    def add(self, made: Input) -> None:
        self.inputs.append(made)

    def main_stream(self) -> Stream:
        return main_stream(self.inputs)

    def main_query(self) -> Query:
        return main_query(self.inputs)


def main_stream(inputs: list[Input]) -> Stream:
    """The predeclared `kv`, an input from its first use on."""
    for known in inputs:
        if isinstance(known, Stream) and known.name == "kv":
            return known
    inputs.insert(0, Stream("kv"))
    return main_stream(inputs)


def main_query(inputs: list[Input]) -> Query:
    """The predeclared `q`, an input from its first use on."""
    for known in inputs:
        if isinstance(known, Query) and known.name == "q":
            return known
    inputs.insert(0, Query("q"))
    return main_query(inputs)


@dataclass(frozen=True, slots=True)
class Word:
    """A primitive. `build(scope, **arguments)` makes the value; `example` is a pattern that a test compiles."""

    name: str
    makes: Kind
    parameters: tuple[Parameter, ...]
    build: Callable[..., Any]
    summary: str
    example: str
