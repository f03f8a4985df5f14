"""Products: the number that a query and a key give, a record for each.

The compiler has a record of the same name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spdsl.runtime.language import tl
from spdsl.runtime.launch.launch import wide
from spdsl.runtime.tiles.kernel import jit
from spdsl.runtime.tiles.tiles import dot_rows


class Product(NamedTuple):
    """vectors: q [.., N, D], k [.., M, D] -> the same for whose rows dot products are the numbers; differentiable.

    rows: a device function of (a0, a1, b0, b1, D1, C), rows in two parts as in `dot_rows` -> [rows of a, rows of b].
    """

    vectors: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    rows: Any


def as_they_are(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return q, k


def unit_vectors(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Of length 1, or 0 as they are."""
    return _unit(q), _unit(k)


def _unit(x: Tensor) -> Tensor:
    x = x.to(wide(x.dtype))
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length.masked_fill(length == 0, 1.0)


def own_numbers(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Of each key the sum of its numbers, whatever the query."""
    return torch.ones_like(q, dtype=wide(q.dtype)), k.to(wide(k.dtype))


@jit
def own_rows(a0, a1, b0, b1, D1: tl.constexpr, C):
    total = tl.sum(b0.to(C.ACC), 1)
    if D1:
        total += tl.sum(b1.to(C.ACC), 1)
    return total[None, :] + tl.zeros((a0.shape[0], b0.shape[0]), dtype=C.ACC)


@jit
def cosine_rows(a0, a1, b0, b1, D1: tl.constexpr, C):
    lengths = row_lengths(a0, a1, D1, C)[:, None] * row_lengths(b0, b1, D1, C)[None, :]
    return tl.where(lengths == 0, 0.0, dot_rows(a0, a1, b0, b1, D1, C) / lengths)


@jit
def row_lengths(x0, x1, D1: tl.constexpr, C):
    x0 = x0.to(C.ACC)
    total = tl.sum(x0 * x0, 1)
    if D1:
        x1 = x1.to(C.ACC)
        total += tl.sum(x1 * x1, 1)
    return tl.sqrt(total)


PRODUCTS: dict[str, Product] = {
    "dot": Product(as_they_are, dot_rows),
    "cosine": Product(unit_vectors, cosine_rows),
    "cohesion": Product(own_numbers, own_rows),
    "antidiagonal": Product(as_they_are, dot_rows),  # of the vectors of a cell side by side, or one after another
}
