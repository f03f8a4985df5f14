"""Compressed streams in torch: one entry for each whole cell of tokens. Differentiable, fixed sizes, no host sync.

Entry i of a sequence covers its tokens [i*stride, i*stride + width). Cells are [B, H, E, width, D], entries
[B, H, E, D]. Entries of packed sequences lie one after the other; those of every other sequence start at 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from spdsl.device.launch import wide
from spdsl.device.sequences import Layout


class Cells(NamedTuple):
    """The cells of a compressed stream, in tokens."""

    width: int
    stride: int


def entry_count(tokens: int, cells: Cells) -> int:
    """Whole cells of a sequence of `tokens`."""
    return max(0, (tokens - cells.width) // cells.stride + 1)


def entry_counts(tokens: Tensor, cells: Cells) -> Tensor:
    """`entry_count` of each number in an int tensor."""
    return (tokens - cells.width + cells.stride).clamp(min=0) // cells.stride


def entry_spans(spans: Tensor, cells: Cells, packed: bool) -> Tensor:
    """Where the entries of token spans [S, 2] = (start, count) lie, int32 likewise."""
    counts = entry_counts(spans[:, 1], cells)
    starts = counts.cumsum(0) - counts if packed else torch.zeros_like(counts)
    return torch.stack([starts, counts], 1).int()


def is_packed(x: Tensor, layout: Layout) -> bool:
    """Whether the sequences share one batch row. A single sequence with a span counts as packed, too."""
    return layout.k_spans is not None and x.shape[0] == 1


def entry_room(x: Tensor, cells: Cells, layout: Layout) -> int:
    """Entries of the tensor made of x [B, H, M, D], known without the lengths of packed sequences."""
    if is_packed(x, layout):  # a sequence has at most one for each stride, or with gaps between cells each width
        return x.shape[2] // min(cells.width, cells.stride)
    return entry_count(x.shape[2], cells)


def cells_of(x: Tensor, cells: Cells, layout: Layout) -> Tensor:
    """x [B, H, M, D] -> [B, H, E, width, D], a view of x for a dense batch; past the last entry 0.

    With spans tokens are copied in parts in which no token is twice, so that the gradient is a sum in one fixed order.
    """
    if layout.k_spans is None:
        if x.shape[2] < cells.width:
            return x[:, :, :0, None].expand(-1, -1, -1, cells.width, -1)
        return x.unfold(2, cells.width, cells.stride).transpose(3, 4)
    first, inside = _first_tokens(x, cells, layout, layout.k_spans)
    steps = torch.arange(cells.width, device=x.device).split(cells.stride)
    parts = [_tokens_at(x, first[:, :, None] + step) for step in steps]
    return torch.cat(parts, 3).masked_fill(~inside[:, None, :, None, None], 0)


def _first_tokens(x: Tensor, cells: Cells, layout: Layout, spans: Tensor) -> tuple[Tensor, Tensor]:
    """The row of x at which each entry starts, and whether there is such an entry: [B, E]."""
    packed = is_packed(x, layout)
    entries = entry_spans(spans, cells, packed)
    number = torch.arange(entry_room(x, cells, layout), device=x.device, dtype=torch.int32)
    if not packed:
        return spans[:, :1].long() + number * cells.stride, number < entries[:, 1:]
    ends = entries.sum(1, dtype=torch.int32)
    sequence = torch.searchsorted(ends, number, right=True).clamp(max=len(spans) - 1)
    first = spans[sequence, 0].long() + (number - entries[sequence, 0]) * cells.stride
    return first[None], (number < ends[-1])[None]


def _tokens_at(x: Tensor, index: Tensor) -> Tensor:
    """x [B, H, M, D] at rows [B, E, n] -> [B, H, E, n, D]; rows outside of x are read at its end."""
    places = index.clamp(0, max(0, x.shape[2] - 1)).flatten(1)[:, None, :, None]
    found = x.gather(2, places.expand(-1, x.shape[1], -1, x.shape[3]))
    return found.view(*found.shape[:2], *index.shape[1:], x.shape[3])


def compress(x: Tensor, cells: Cells, layout: Layout, pool: Callable[[Tensor], Tensor]) -> Tensor:
    """x [B, H, M, D] -> entries [B, H, E, D]; past the last entry 0, and a gradient there is not read."""
    entries = pool(cells_of(x, cells, layout))
    if layout.k_spans is None:
        return entries
    _, inside = _first_tokens(x, cells, layout, layout.k_spans)
    return entries.masked_fill(~inside[:, None, :, None], 0)


# Pools: cells [B, H, E, width, D] -> entries [B, H, E, D] in the dtype of the cells, summed in fp32 or wider.


def pool_mean(c: Tensor) -> Tensor:
    return c.mean(3, dtype=wide(c.dtype)).to(c.dtype)


def pool_max(c: Tensor) -> Tensor:
    """The gradient goes to the first maximum."""
    return c.max(3).values


def pool_weighted(c: Tensor, weight: Tensor, position: Tensor) -> Tensor:
    """sum over w of weight[h, w] * (c[.., w, :] + position[h, w, :])"""
    dtype = wide(c.dtype)
    weight, position = weight.to(dtype), position.to(dtype)
    moved = torch.einsum("hw,hwd->hd", weight, position)
    return (torch.einsum("hw,bhewd->bhed", weight, c.to(dtype)) + moved[:, None]).to(c.dtype)


def pool_mlp(c: Tensor, position: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """gelu(flatten(c + position) @ up) @ down; position [H, width, D], up [H, width, D, hidden], down [H, hidden, D].

    The position is a bias of the first product. Then its gradient needs no sum over cells, and c + position is never
    rounded or stored. Heads are the batch of the products, or `up` would be copied for each row of the batch.
    """
    up, down = up.flatten(1, 2).to(c.dtype), down.to(c.dtype)
    bias = position.flatten(1).unsqueeze(1).to(c.dtype) @ up
    flat = c.transpose(0, 1).reshape(c.shape[1], c.shape[0] * c.shape[2], c.shape[3] * c.shape[4])
    hidden = torch.nn.functional.gelu(torch.baddbmm(bias, flat, up))
    return (hidden @ down).view(c.shape[1], c.shape[0], c.shape[2], down.shape[2]).transpose(0, 1)


def pool_softmax(c: Tensor, z: Tensor) -> Tensor:
    """sum over w of softmax_w(z[.., w, :]) * c[.., w, :]; z like c, or of size 1 where it is shared."""
    return (torch.softmax(z, 3, dtype=wide(c.dtype)) * c).sum(3).to(c.dtype)
