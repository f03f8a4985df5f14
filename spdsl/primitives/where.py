"""where(condition): the keys for which an element expression over q, k, h, length and tensors holds."""

from __future__ import annotations

from spdsl.ir.symbols import Boolean
from spdsl.primitives.word import Kind, Parameter, Scope, SetValue, Word


def where(scope: Scope, condition: Boolean) -> SetValue:
    return SetValue(((None, condition),))


WORD = Word(
    "where",
    Kind.SET,
    (Parameter("condition", Kind.CONDITION),),
    where,
    "the keys for which the condition over q, k, h, length and tensors holds",
    "pattern p { causal doc = tensor(token, int) return attend(where(doc[k] == doc[q])) }",
)
