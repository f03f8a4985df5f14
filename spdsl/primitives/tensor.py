"""name = tensor(axes..., type): numbers from the caller, read in element expressions as name[index]."""

from __future__ import annotations

from spdsl.ir.pattern import Tensor
from spdsl.primitives.word import Kind, Parameter, Scope, Word

TYPES = ("float", "int", "bool")


def tensor(scope: Scope, axes: tuple[str | int, ...], type: str) -> Tensor:
    if axes and axes[-1] in TYPES:  # `tensor(token, bool)`: the type may stand after the axes
        axes, type = axes[:-1], str(axes[-1])
    if axes.count("query") > 1:
        scope.refuse("E202", "a tensor has one axis of rows", "leave the other `query` out: both are read at `q`")
    made = Tensor(scope.name, axes, type, span=scope.span)
    scope.add(made)
    return made


WORD = Word(
    "tensor",
    Kind.TENSOR,
    (
        Parameter("axes", Kind.AXIS, default=(), many=True),
        Parameter("type", Kind.CHOICE, default="float", words=TYPES),
    ),
    tensor,
    "numbers from the caller",
    "pattern p { causal style = tensor(head, int) return attend(sliding(16) | where(style[h] == 1)) }",
)
