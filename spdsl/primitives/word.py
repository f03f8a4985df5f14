"""What a word of the language is: its parameters, what it makes, and how.

The grammar knows no word by name. The lowering looks a call up in the registry, evaluates each argument as the kind
that its parameter asks for, and calls `build`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from spdsl.diagnostics import Applicability, Hint, Span
from spdsl.ir.pattern import Branch, Input, Kept, Kl, Pooled, Query, Score, Stream, Tensor
from spdsl.ir.skip import Skip
from spdsl.ir.symbols import Boolean
from spdsl.limits import NUMBER_VALUE


class Kind(Enum):
    """What an argument is evaluated to, or what a word makes."""

    SIZE = "a size"  # compile-time integer
    NUMBER = "a number"  # compile-time real, exact
    COUNT = "a number of units"  # a size, or an element expression without positions: known at the call
    LEVEL = "a level"  # a number, or the same
    ELEMENT = "an element expression"  # over q, k, h, length and tensor reads
    CONDITION = "a condition"  # Boolean over the same
    SET = "a set"
    STREAM = "a stream"
    QUERY = "a query"
    TENSOR = "a tensor"
    BRANCH = "a branch"
    UNGATED = "a branch without gates"  # a part of a merge or of a gate: there is one set of gates, for all branches
    SCORE = "a score"
    VECTORS = "a stream or a query"
    RESULT = "a result"  # a branch, or what stands behind it in `return`: a score, pooled or not, a loss
    SKIP = "a rule to skip by"  # `below(...)`
    UNITS = "a set of units"  # a set; `first` and `last` in it count units of the choice that it is written in
    CELLS = "a way from tokens to entries"
    GRAIN = "a grain"  # a size, or one of Parameter.words; with a reduction: `max(64)`, `sum(group)`
    AXIS = "an axis"  # a size, or one of the words head, kv_head, query, token
    CHOICE = "one of its words"  # one of Parameter.words
    CODE = "the code of a warning"
    STATEMENT = "a statement"  # of the pattern itself; stands alone and has no name


class Default:
    """A default that is no value."""


REQUIRED = Default()  # there is none
UNIT_OF_CHOICE = Default()  # 1; inside of a choice its unit


@dataclass(frozen=True, slots=True)
class Grain:
    """`size` or `by(size)`: how coarse, and how what is finer is reduced to it."""

    size: int | str
    by: str | None = None


@dataclass(frozen=True, slots=True)
class Cells:
    """How a cell of tokens becomes an entry; `logits` is the stream inside of `softmax(...)`."""

    by: str
    logits: str | None = None


@dataclass(frozen=True, slots=True)
class Parameter:
    """`least` and `most` bound a SIZE, `least` a NUMBER; `words` lists what a CHOICE or GRAIN may be, `many` takes all
    that follow.

    `planned` are words that the language specifies here and that are not built. `bound` is the parameter that a COUNT
    needs if only the call knows it. `of_tokens`: a LEVEL that is asked of sequences with tokens alone, so that `length`
    may divide.
    """

    name: str
    kind: Kind
    default: object = REQUIRED
    least: int | None = None
    words: tuple[str, ...] = ()
    many: bool = False
    planned: tuple[str, ...] = ()
    most: int = NUMBER_VALUE
    bound: str = ""
    of_tokens: bool = False


@dataclass(frozen=True, slots=True)
class SetValue:
    """A set: for each stream (None: not placed on one yet) the test that its entries pass."""

    parts: tuple[tuple[str | None, Boolean], ...]


Value = SetValue | Stream | Query | Tensor | Branch | Score | Pooled | Kl | Kept | Skip


@dataclass(slots=True)
class Scope:
    """What `build` may ask of its surroundings: the name it is bound to, and a place for new inputs."""

    name: str  # the binding's name, or one made from the word
    span: Span
    inputs: list[Input]
    query_heads: int | None
    kv_heads: int | None
    causal: bool
    refuse: Callable[[str, str, str | Hint], None]  # (code, message, hint): reports an error at the call
    instead: Callable[[str, int, int, Applicability], Hint]  # (argument, number, wanted one): the hint to write that
    given_as: Callable[[str, str, Applicability, str], Hint]  # (argument, its text, how sure, what else to say)

    def add(self, made: Input) -> None:
        self.inputs.append(made)

    def main_stream(self) -> Stream:
        return main_stream(self.inputs)

    def main_query(self) -> Query:
        return main_query(self.inputs)

    def stream(self, name: str) -> Stream:
        return stream_of(self.inputs, name)

    def query(self, name: str) -> Query:
        return next(known for known in self.inputs if isinstance(known, Query) and known.name == name)


def stream_of(inputs: Sequence[Input], name: str) -> Stream:
    return next(known for known in inputs if isinstance(known, Stream) and known.name == name)


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
    """A primitive. `build(scope, **arguments)` makes the value; `example` is a pattern that a test compiles.

    `planned` are parameters that are not built. A value that is bound to no name is called `unnamed`, or as the word;
    names in the module begin with it. `unit` tells from the inputs and the other arguments what the UNITS among the
    arguments count. The value of a statement becomes the field `states` of the Pattern.
    """

    name: str
    makes: Kind
    parameters: tuple[Parameter, ...]
    build: Callable[..., Any]
    summary: str
    example: str
    planned: tuple[str, ...] = ()
    unnamed: str | None = None
    unit: Callable[[Sequence[Input], Mapping[str, Any]], int] | None = None
    states: str | None = None
