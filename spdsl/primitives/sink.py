"""sink(n): the first n tokens, which softmax uses as a place to put its mass (StreamingLLM, arXiv 2309.17453)."""

from __future__ import annotations

from spdsl.ir.symbols import K
from spdsl.primitives.word import Kind, Parameter, Scope, SetValue, Word


def sink(scope: Scope, n: int) -> SetValue:
    return SetValue(((None, n > K),))


WORD = Word(
    "sink",
    Kind.SET,
    (Parameter("n", Kind.SIZE, least=1),),
    sink,
    "the first n tokens",
    "pattern p { causal return attend(sink(4) | sliding(64)) }",
)
