"""Compressed streams: entry i is made of the tokens [i * stride, i * stride + width), K and V apart.

Only whole cells become entries. The mlp with a position embedding is that of Native Sparse Attention
(arXiv 2502.11089, eq. 7).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu

from spdsl.ir.pattern import Grid, Stream
from spdsl.oracle.sizes import Inputs


def entries(grid: Grid, tokens: int) -> int:
    """Whole cells among `tokens` tokens."""
    if grid.before or grid.partial:
        raise ValueError("cells that begin before their stride, or are cut short, have no meaning here yet")
    return max(0, (tokens - grid.width) // grid.stride + 1)


def cells(grid: Grid, x: Tensor) -> Tensor:
    """The tokens of each entry: [B, heads, M, dim] -> [B, heads, E, width, dim]."""
    starts = [i * grid.stride for i in range(entries(grid, x.shape[2]))]
    if not starts:
        return x[:, :, :0].unsqueeze(3).expand(-1, -1, -1, grid.width, -1)
    return torch.stack([x[:, :, start : start + grid.width] for start in starts], 2)


def compressed(stream: Stream, side: str, x: Tensor, z: Tensor | None, inputs: Inputs) -> Tensor:
    """Entries [B, heads, E, dim] of the tokens x [B, heads, M, dim]; `side` is k or v, z the logits of `softmax`.

    Weights, by role, from `inputs`: `weight` [heads, width], `position` [heads, width, dim], `up` [heads, width, dim,
    hidden], `down` [heads, hidden, dim].
    """
    assert stream.compress is not None
    x_cells = cells(stream.grid, x)
    if stream.compress.by == "mean":
        return x_cells.mean(3)
    if stream.compress.by == "max":
        return x_cells.amax(3)
    if stream.compress.by == "softmax":
        assert z is not None
        if z.shape != x.shape:
            raise ValueError(f"{stream.name}: logits {list(z.shape)} do not fit the tokens {list(x.shape)}")
        return (torch.softmax(cells(stream.grid, z), 3) * x_cells).sum(3)
    placed = x_cells + _weight(stream, side, "position", inputs).unsqueeze(1)
    if stream.compress.by == "weighted":
        return torch.einsum("hw,bhewd->bhed", _weight(stream, side, "weight", inputs), placed)
    if stream.compress.by == "mlp":
        hidden = torch.einsum("bhewd,hwdf->bhef", placed, _weight(stream, side, "up", inputs))
        return torch.einsum("bhef,hfd->bhed", gelu(hidden), _weight(stream, side, "down", inputs))
    raise ValueError(f"{stream.name}: `{stream.compress.by}` is no way to compress")


def _weight(stream: Stream, side: str, role: str, inputs: Inputs) -> Tensor:
    return inputs[f"{stream.name}_{side}_{role}"].double()
