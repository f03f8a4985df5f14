"""Branches of a result: a softmax over terms, and how several of them are put together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from spdsl.diagnostics import Span
from spdsl.ir.product import DOT, Product
from spdsl.ir.skip import Skip
from spdsl.ir.symbols import Boolean, Expr


@dataclass(frozen=True, slots=True)
class Term:
    """The entries of `stream` that pass `test`; `causal` is part of the test already."""

    stream: str
    test: Boolean
    span: Span | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Softmax:
    """One normaliser over terms of any streams, each stream at most once."""

    name: str
    query: str
    terms: tuple[Term, ...]
    scale: Expr | None = None  # None: 1 / sqrt(head_dim of q)
    bias: Expr | None = None  # added to the scaled logits, over q, k, h, length and lookups
    softcap: float | None = None
    sink: str | None = None  # a Tensor with the axis `head`: a logit in the denominator only
    span: Span | None = field(default=None, compare=False)
    product: Product = DOT  # of a query and a key
    rows: int = 1
    """Queries of a row: of a query of cells the width. `q` of its tests is then the last query of the cell in the call,
    and each query of the cell gets the row's output."""
    skip: Skip | None = None  # the tiles that it leaves out


@dataclass(frozen=True, slots=True)
class Gate:
    """The plain sum of branches times the caller's `gates` [B, Hq, N, branches]."""

    branches: tuple[Branch, ...]
    span: Span | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Merge:
    """The exact log-sum-exp merge of branches over disjoint keys."""

    branches: tuple[Branch, ...]
    span: Span | None = field(default=None, compare=False)


Branch = Softmax | Gate | Merge


@dataclass(frozen=True, slots=True)
class Kept:
    """How many tiles a softmax with a skip keeps and sees, as a further result: int32 [B, Hq, row tiles, 2]."""

    softmax: Softmax
    span: Span | None = field(default=None, compare=False)


def softmaxes_in(branch: Branch) -> Iterator[Softmax]:
    """The softmaxes of a branch as they stand in it, repetitions too."""
    if isinstance(branch, Softmax):
        yield branch
    else:
        for inner in branch.branches:
            yield from softmaxes_in(inner)


def leaves(branch: Branch) -> int:
    """The softmaxes of a branch, repetitions counted."""
    return sum(1 for _ in softmaxes_in(branch))
