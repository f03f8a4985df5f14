"""skip = below(x, rows, unit, restart, share): a softmax leaves out tiles far below its running maximum.

Far: all below max + log(x) (BLASST, arXiv 2512.12087; the second stage of SpargeAttn, arXiv 2502.18137).
"""

from __future__ import annotations

from spdsl.diagnostics import Applicability
from spdsl.ir.pattern import LEAST_BLOCK, Tensor
from spdsl.ir.skip import Skip
from spdsl.ir.symbols import Expr, lookup_name, lookups
from spdsl.limits import SKIP_TILE
from spdsl.primitives.grains import nearest
from spdsl.primitives.word import Kind, Parameter, Scope, Word


def below(scope: Scope, x: Expr, rows: int, unit: int, restart: int, share: str) -> Skip | None:
    for name, size in (("rows", rows), ("unit", unit)):
        if size & (size - 1) or (name == "rows" and 1 < size < LEAST_BLOCK):
            near = max(LEAST_BLOCK, 1 << (size.bit_length() - 1))
            hint = scope.instead(name, size, near, Applicability.MAYBE)
            scope.refuse("E203", f"{name} = {size} is no power of two from {LEAST_BLOCK} on", hint)
            return None
    if restart % unit:
        near = nearest(restart, unit)
        hint = scope.instead("restart", restart, near, Applicability.MAYBE)
        scope.refuse("E203", f"restart = {restart} cuts a tile of {unit} keys", hint)
        return None
    return Skip(x, rows, unit, restart, share) if _of_heads(scope, x) else None


def _of_heads(scope: Scope, x: Expr) -> bool:
    """Whether what the level reads has a number for each head, or one for all; an error if not."""
    for read in lookups(x):
        tensor = next(known for known in scope.inputs if known.name == lookup_name(read))
        assert isinstance(tensor, Tensor)
        if tensor.by_token or tensor.by_row:
            message = f"`{tensor.name}` has a number for each position, a level is one for all"
            scope.refuse("E204", message, "use a tensor with a `head` axis, or none")
            return False
    return True


WORD = Word(
    "below",
    Kind.SKIP,
    (
        Parameter("x", Kind.LEVEL, of_tokens=True),
        Parameter("rows", Kind.SIZE, default=1, least=1, most=SKIP_TILE),
        Parameter("unit", Kind.SIZE, default=128, least=LEAST_BLOCK, most=SKIP_TILE),
        Parameter("restart", Kind.SIZE, default=0, least=0),
        Parameter("share", Kind.CHOICE, default="head", words=("head", "group")),
    ),
    below,
    "tiles far below the running maximum of a softmax, which it leaves out",
    "pattern p { causal return attend(all, skip = below(8 / length, unit = 64)) if decode "
    "return attend(all, skip = below(64 / length, rows = 64, unit = 64)) }",
)
