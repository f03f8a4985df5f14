"""Compressed streams, K and V apart: entry i is made of the tokens of the sequence among `width` from token
i * stride - before on.

Cells that are not whole at its end become no entries, or with `partial` the first of them does. The mlp with a position
embedding is that of Native Sparse Attention (arXiv 2502.11089, eq. 7).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu

from spdsl.ir.pattern import Grid, Query, Stream
from spdsl.oracle.sizes import Inputs, Sizes


def entries(grid: Grid, tokens: int) -> int:
    """How many cells of a sequence become one."""
    count = end = 0  # of the tokens that lie in a cell
    while end < tokens and (grid.partial or count * grid.stride - grid.before + grid.width <= tokens):
        end = count * grid.stride - grid.before + grid.width
        count += 1
    return count


def cells(grid: Grid, tokens: int) -> list[tuple[slice, slice]]:
    """Of each entry its tokens, and their places in the cell."""
    starts = [i * grid.stride - grid.before for i in range(entries(grid, tokens))]
    spans = [(max(start, 0), min(start + grid.width, tokens), start) for start in starts]
    return [(slice(first, end), slice(first - start, end - start)) for first, end, start in spans]


def compressed(stream: Stream, side: str, x: Tensor, z: Tensor | None, inputs: Inputs) -> Tensor:
    """Entries [B, heads, E, dim] of the tokens x [B, heads, M, dim]; `side` is k or v, z the logits of `softmax`.

    Weights, by role, from `inputs`: `weight` [heads, width], `position` [heads, width, dim], `up` [heads, width, dim,
    hidden], `down` [heads, hidden, dim].
    """
    if z is not None and z.shape != x.shape:
        raise ValueError(f"{stream.name}: logits {list(z.shape)} do not fit the tokens {list(x.shape)}")
    made = [_entry(stream, side, x, z, *cell, inputs) for cell in cells(stream.grid, x.shape[2])]
    return torch.stack(made, 2) if made else x[:, :, :0]


def pooled_queries(query: Query, x: Tensor, sizes: Sizes) -> Tensor:
    """[B, heads, N, dim] -> [B, heads, cells, dim]: cell c holds the queries of the call with position // width = c."""
    cell = sizes.cell_of_rows(query.width)
    own = [x[:, :, cell == i] for i in range(sizes.tiles(query.width))]
    made = [part.mean(2) if query.by == "mean" else part.amax(2) for part in own]
    return torch.stack(made, 2) if made else x


def _entry(
    stream: Stream, side: str, x: Tensor, z: Tensor | None, tokens: slice, places: slice, inputs: Inputs
) -> Tensor:
    """One entry [B, heads, dim]: a token that is not there takes no part, nor does its place."""
    assert stream.compress is not None
    by, own = stream.compress.by, x[:, :, tokens]
    if by == "mean":
        return own.mean(2)
    if by == "max":
        return own.amax(2)
    if by == "min":
        return own.amin(2)
    if by in ("cohesion_mean", "cohesion_min"):
        return _alike(own, by)
    if by == "softmax":
        assert z is not None
        return (torch.softmax(z[:, :, tokens], 2) * own).sum(2)
    placed = own + _weight(stream, side, "position", inputs)[:, places]
    if by == "weighted":
        return torch.einsum("hw,bhwd->bhd", _weight(stream, side, "weight", inputs)[:, places], placed)
    if by == "mlp":
        hidden = torch.einsum("bhwd,hwdf->bhf", placed, _weight(stream, side, "up", inputs)[:, places])
        return torch.einsum("bhf,hfd->bhd", gelu(hidden), _weight(stream, side, "down", inputs))
    raise ValueError(f"{stream.name}: `{by}` is no way to compress")


def _alike(own: Tensor, by: str) -> Tensor:
    """The tokens' cosines with each other, or with their mean, as the first number of an entry of zeros."""
    others = own if by == "cohesion_mean" else own.mean(2, keepdim=True)
    lengths = own.norm(dim=-1).unsqueeze(-1) * others.norm(dim=-1).unsqueeze(-2)
    cosines = torch.where(lengths == 0, 0.0, own @ others.transpose(-2, -1) / torch.where(lengths == 0, 1.0, lengths))
    found = torch.zeros_like(own[:, :, 0])
    found[..., 0] = cosines.mean((-2, -1)) if by == "cohesion_mean" else cosines.amin((-2, -1))
    return found


def _weight(stream: Stream, side: str, role: str, inputs: Inputs) -> Tensor:
    return inputs[f"{stream.name}_{side}_{role}"].double()
