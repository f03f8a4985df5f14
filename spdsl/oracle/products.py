"""The number that a query and a key give, before it is scaled."""

from __future__ import annotations

from torch import Tensor

from spdsl.ir.product import Product


def multiplied(product: Product, q: Tensor, k: Tensor) -> Tensor:
    """q [.., N, D], k [.., M, D] -> [.., N, M]"""
    if product.name == "dot":
        return q @ k.transpose(-2, -1)
    raise ValueError(f"`{product.name}` is no product")
