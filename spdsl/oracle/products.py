"""The number that a query and a key give, before it is scaled."""

from __future__ import annotations

import torch
from torch import Tensor

from spdsl.ir.product import Product


def multiplied(product: Product, q: Tensor, k: Tensor) -> Tensor:
    """q [.., N, D], k [.., M, D] -> [.., N, M]"""
    if product.name in ("dot", "antidiagonal"):  # the latter of the vectors of a cell side by side
        return q @ k.transpose(-2, -1)
    if product.name == "cosine":
        lengths = q.norm(dim=-1).unsqueeze(-1) * k.norm(dim=-1).unsqueeze(-2)
        return torch.where(lengths == 0, 0.0, q @ k.transpose(-2, -1) / torch.where(lengths == 0, 1.0, lengths))
    if product.name == "cohesion":  # of the entry alone
        return k.sum(-1).unsqueeze(-2).expand(*q.shape[:-1], k.shape[-2])
    raise ValueError(f"`{product.name}` is no product")


def antidiagonal(q: Tensor, k: Tensor, step: int, q_origin: int) -> Tensor:
    """Of each cell i of `step` queries and j of `step` keys the sum over s of q[i, step - 1 - s] . k[j, s].

    q [B, H, N, D], whose first row has position q_origin, k [B, H, M, D] -> [B, H, cells of q, cells of k]. Rows and
    keys that are not there add nothing.
    """
    first, end = q_origin // step, -(-(q_origin + q.shape[2]) // step)
    found = q.new_zeros(*q.shape[:2], end - first, -(-k.shape[2] // step))
    for s in range(step):
        keys = range(s, k.shape[2], step)
        for i in range(first, end):
            row = i * step + step - 1 - s - q_origin
            if 0 <= row < q.shape[2]:
                found[:, :, i - first, : len(keys)] += (q[:, :, row : row + 1] @ k[:, :, s::step].transpose(-2, -1))[
                    :, :, 0
                ]
    return found
