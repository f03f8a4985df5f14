"""expect(length, batch, page): the calls that a pattern is written for; its costs are judged by them."""

from __future__ import annotations

from spdsl.diagnostics import Applicability
from spdsl.ir.pattern import LEAST_BLOCK, Expected
from spdsl.limits import BATCH
from spdsl.primitives.word import Kind, Parameter, Scope, Word


def expect(scope: Scope, length: int | None, batch: int, page: int | None) -> Expected | None:
    if page is not None and page & (page - 1):
        below = 1 << (page.bit_length() - 1)
        near = below if page - below < 2 * below - page else 2 * below
        hint = scope.instead("page", page, near, Applicability.MACHINE)
        scope.refuse("E203", f"a page of {page} tokens is no power of two", hint)
        return None
    return Expected(length, batch, page)


WORD = Word(
    "expect",
    Kind.STATEMENT,
    (
        Parameter("length", Kind.SIZE, default=None, least=1),
        Parameter("batch", Kind.SIZE, default=1, least=1, most=BATCH),
        Parameter("page", Kind.SIZE, default=None, least=LEAST_BLOCK),
    ),
    expect,
    "the calls that a pattern is written for, to judge its costs by",
    "pattern p { causal expect(length = 65536, batch = 4, page = 64) return attend(sliding(64)) }",
    states="expected",
)
