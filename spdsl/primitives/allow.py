"""allow(codes...): warnings that are not told about this pattern."""

from __future__ import annotations

from spdsl.primitives.word import Kind, Parameter, Scope, Word


def allow(scope: Scope, codes: tuple[str, ...]) -> tuple[str, ...]:
    return codes


WORD = Word(
    "allow",
    Kind.STATEMENT,
    (Parameter("codes", Kind.CODE, many=True),),
    allow,
    "warnings that are not told about this pattern",
    "pattern p { causal allow(W402) return attend(sliding(64) - sliding(2)) }",
    states="allowed",
)
