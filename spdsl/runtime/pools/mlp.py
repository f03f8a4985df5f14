"""mlp: gelu(flatten(c + position) @ up) @ down."""

from __future__ import annotations

import torch
from torch import Tensor

from spdsl.runtime.entries.close_mlp import close_mlp
from spdsl.runtime.pools.pool import Pool


def pool_mlp(c: Tensor, there: Tensor | None, position: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """position [H, width, D], up [H, width, D, hidden], down [H, hidden, D].

    The position is a bias of the first product. Then its gradient needs no sum over cells, and c + position is never
    rounded or stored. Heads are the batch of the products, or `up` would be copied for each row of the batch. A token
    that is not there is a vector of zeros without a position.
    """
    up, down, position = up.to(c.dtype), down.to(c.dtype), position.to(c.dtype)
    if there is None:
        bias = position.flatten(1).unsqueeze(1) @ up.flatten(1, 2)
    else:  # of each cell the sum of what its places add
        shares = (position.unsqueeze(2) @ up).squeeze(2)
        bias = there.to(c.dtype).expand(c.shape[0], -1, -1).flatten(0, 1) @ shares
    flat = c.transpose(0, 1).reshape(c.shape[1], c.shape[0] * c.shape[2], c.shape[3] * c.shape[4])
    hidden = torch.nn.functional.gelu(torch.baddbmm(bias, flat, up.flatten(1, 2)))
    return (hidden @ down).view(c.shape[1], c.shape[0], c.shape[2], down.shape[2]).transpose(0, 1)


MLP = Pool("mlp", pool_mlp, close_mlp)
