"""The number that a query and a key give, before it is scaled."""

from __future__ import annotations

import torch
from torch import Tensor

from spdsl.ir.product import Product


def multiplied(product: Product, q: Tensor, k: Tensor) -> Tensor:
    """q [.., N, D], k [.., M, D] -> [.., N, M]"""
    if product.name == "dot":
        return q @ k.transpose(-2, -1)
    if product.name == "cosine":
        lengths = q.norm(dim=-1).unsqueeze(-1) * k.norm(dim=-1).unsqueeze(-2)
        return torch.where(lengths == 0, 0.0, q @ k.transpose(-2, -1) / torch.where(lengths == 0, 1.0, lengths))
    raise ValueError(f"`{product.name}` is no product")
