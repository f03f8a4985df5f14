"""Products: the number that a query and a key give, a record for each.

The compiler has a record of the same name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from spdsl.runtime.tiles.tiles import dot_rows


class Product(NamedTuple):
    """vectors: q [.., N, D], k [.., M, D] -> the same for whose rows dot products are the numbers; differentiable.

    rows: a device function of (a0, a1, b0, b1, D1, C), rows in two parts as in `dot_rows` -> [rows of a, rows of b].
    """

    vectors: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    rows: Any


def as_they_are(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return q, k


PRODUCTS: dict[str, Product] = {
    "dot": Product(as_they_are, dot_rows),
}
