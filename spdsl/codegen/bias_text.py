"""bias_text: what the templates print of a read of a bias that has a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import sympy

from spdsl.codegen.expressions import TORCH, TRITON, expression
from spdsl.codegen.reads import Reads
from spdsl.ir.bias import BiasRead, Place
from spdsl.ir.pattern import Tensor
from spdsl.ir.symbols import Expr


@dataclass(frozen=True, slots=True)
class BiasText:
    """`_of` is torch, the rest Triton."""

    number: int
    tensor: Tensor
    place: str  # head, row, key, table or pair
    slope: str
    slope_of: str
    read: str  # of a table its first entry
    read_of: str
    pointer: str
    there: str
    entry: str  # of a table
    within: str
    entries: int
    table_axes: tuple[int, ...]  # of the argument, batch first
    by_distance: bool  # whether q - k alone decides the entry
    by_head: bool


def bias_texts(found: Sequence[BiasRead], reads: Reads) -> tuple[BiasText, ...]:
    return tuple(_text(number, read, reads) for number, read in enumerate(found))


def _text(number: int, found: BiasRead, reads: Reads) -> BiasText:
    def triton(value: Expr) -> str:
        return expression(value, TRITON, reads.triton)

    tensor = reads.sources[found.tensor.name]
    assert isinstance(tensor, Tensor)
    table = found.moving_axes if found.place is Place.TABLE else ()
    sizes = [axis for i in table if isinstance(axis := tensor.axes[i], int)]
    indices = [triton(found.read.args[i]) for i in table]
    first = found.read.func(*(sympy.S.Zero if i in table else index for i, index in enumerate(found.read.args)))
    pointer, there = reads.pointer(first, triton)
    return BiasText(
        number, tensor, found.place.name.lower(), triton(found.slope), expression(found.slope, TORCH, reads.torch),
        triton(first), expression(found.read, TORCH, reads.torch), pointer, there, _entry(indices, sizes),
        " & ".join(f"({index} >= 0) & ({index} < {size})" for index, size in zip(indices, sizes, strict=True)),
        prod(sizes) if table else 0, tuple(i + 1 for i in table),
        bool(table) and found.by_distance, found.by_head,
    )  # fmt: skip


def _entry(indices: Sequence[str], sizes: Sequence[int]) -> str:
    """The number of an entry: the last axis runs fastest."""
    text = ""
    for index, size in zip(indices, sizes, strict=True):
        text = f"({text}) * {size} + ({index})" if text else f"({index})"
    return text
