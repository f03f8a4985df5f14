"""The written form: what the user typed, one node per construct, each with its place in the source.

A tree knows no meaning: names are not resolved, sizes not computed. Every expression carries its depth, so
that a source nested too deeply is refused while the tree is built, before anything walks it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

from spdsl.diagnostics import Span


@dataclass(frozen=True, slots=True)
class Name:
    text: str
    span: Span = field(compare=False)
    depth: int = field(default=1, compare=False)


@dataclass(frozen=True, slots=True)
class Number:
    value: Fraction
    span: Span = field(compare=False)
    depth: int = field(default=1, compare=False)


@dataclass(frozen=True, slots=True)
class Argument:
    """`value` or `name = value` inside a call."""

    name: Name | None
    value: Expr


@dataclass(frozen=True, slots=True)
class Call:
    """`function(arguments)`"""

    function: Name
    arguments: tuple[Argument, ...]
    span: Span = field(compare=False)
    depth: int = field(compare=False)


@dataclass(frozen=True, slots=True)
class Restrict:
    """`base[index]`: a set on a stream, or an element of a tensor."""

    base: Expr
    index: Expr
    span: Span = field(compare=False)
    depth: int = field(compare=False)


@dataclass(frozen=True, slots=True)
class Unary:
    """`-operand` or `~operand`"""

    operator: str
    operand: Expr
    span: Span = field(compare=False)
    depth: int = field(compare=False)


@dataclass(frozen=True, slots=True)
class Binary:
    """`left operator right`, the operator one of `| & + - * / // % < <= > >= == !=`."""

    operator: str
    left: Expr
    right: Expr
    span: Span = field(compare=False)
    depth: int = field(compare=False)


Expr = Name | Number | Call | Restrict | Unary | Binary


@dataclass(frozen=True, slots=True)
class Pair:
    """`name = value` after `heads`, `dim` or `param`."""

    name: Name
    value: Expr


@dataclass(frozen=True, slots=True)
class Declaration:
    """`heads ...`, `dim ...` or `param ...`; `keyword` is that word."""

    keyword: str
    pairs: tuple[Pair, ...]
    span: Span = field(compare=False)


@dataclass(frozen=True, slots=True)
class Causal:
    span: Span = field(compare=False)


@dataclass(frozen=True, slots=True)
class Binding:
    """`name = value`"""

    name: Name
    value: Expr
    span: Span = field(compare=False)


@dataclass(frozen=True, slots=True)
class Policy:
    """A call as a statement: `keep(...)`, `tier(...)`."""

    call: Call
    span: Span = field(compare=False)


@dataclass(frozen=True, slots=True)
class Result:
    """`return values` or `return values if condition`"""

    values: tuple[Expr, ...]
    condition: Expr | None
    span: Span = field(compare=False)


Item = Declaration | Causal | Binding | Policy | Result


@dataclass(frozen=True, slots=True)
class PatternTree:
    """One `pattern name { ... }`; `comment` is the comment right above it, without the `#`."""

    name: Name
    items: tuple[Item, ...]
    comment: str
    span: Span = field(compare=False)


@dataclass(frozen=True, slots=True)
class FileTree:
    patterns: tuple[PatternTree, ...]
