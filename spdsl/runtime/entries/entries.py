"""Compressed streams in torch: one entry for each cell of tokens. Differentiable, fixed sizes, no host sync.

Entry i of a sequence covers its tokens in [i*stride - before, i*stride - before + width). Cells are
[B, H, E, width, D], 0 where a token is not there, entries [B, H, E, D]. Entries of packed sequences lie one after the
other; those of every other sequence start at 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from spdsl.runtime.sequences import Layout


class Cells(NamedTuple):
    """The cells of a compressed stream, in tokens. Cell i begins `before` tokens before i * stride.

    Tokens before the sequence are not there. A cell that is not whole at its end has no entry; with `partial` the first
    of them has, so that every token lies in some cell.
    """

    width: int
    stride: int
    before: int = 0
    partial: bool = False

    @property
    def clipped(self) -> bool:
        """Whether some cells have less than `width` tokens."""
        return self.before > 0 or self.partial


def entry_count(tokens: int, cells: Cells) -> int:
    """The entries of a sequence of `tokens`."""
    if cells.partial:
        return min(tokens, max(1, (tokens + cells.before - cells.width + 2 * cells.stride - 1) // cells.stride))
    return max(0, (tokens + cells.before - cells.width) // cells.stride + 1)


def entry_counts(tokens: Tensor, cells: Cells) -> Tensor:
    """`entry_count` of each number in an int tensor."""
    if cells.partial:
        counts = (tokens + cells.before - cells.width + 2 * cells.stride - 1).clamp(min=cells.stride) // cells.stride
        return counts.minimum(tokens)
    return (tokens + cells.before - cells.width + cells.stride).clamp(min=0) // cells.stride


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
    if layout.k_spans is None or not is_packed(x, layout):
        return entry_count(x.shape[2], cells)
    # A sequence has at most (tokens + more) // stride entries, and never more of them than tokens.
    more = cells.before - cells.width + cells.stride
    if cells.partial:
        more = max(more, 0) + cells.stride - 1
    if more <= 0:
        return x.shape[2] // cells.stride
    return min(x.shape[2], (x.shape[2] + len(layout.k_spans) * more) // cells.stride)


def cells_of(x: Tensor, cells: Cells, layout: Layout) -> Tensor:
    """x [B, H, M, D] -> [B, H, E, width, D]; of a dense batch with whole cells a view of x. Past the last entry 0.

    With spans tokens are copied in parts in which no token is twice, so that the gradient is a sum in one fixed order.
    """
    if layout.k_spans is None:
        count = entry_count(x.shape[2], cells)
        if count == 0:
            return x[:, :, :0, None].expand(-1, -1, -1, cells.width, -1)
        behind = max(0, (count - 1) * cells.stride + cells.width - cells.before - x.shape[2])
        x = torch.nn.functional.pad(x, (0, 0, cells.before, behind)) if cells.clipped else x
        return x.unfold(2, cells.width, cells.stride).transpose(3, 4)
    places = _cell_places(x, cells, layout, layout.k_spans)
    steps = torch.arange(cells.width, device=x.device).split(cells.stride)
    parts = [_tokens_at(x, (places.start + places.first)[:, :, None] + step) for step in steps]
    return torch.cat(parts, 3).masked_fill(~places.holds(cells)[:, None, :, :, None], 0)


def cells_there(x: Tensor, cells: Cells, layout: Layout) -> Tensor | None:
    """Which tokens of the cells of x are there, bool [B or 1, E, width]; None: all. Past the last entry all are."""
    if not cells.clipped:
        return None
    if layout.k_spans is not None:
        places = _cell_places(x, cells, layout, layout.k_spans)
        return places.holds(cells) | ~places.inside[:, :, None]
    first = torch.arange(entry_count(x.shape[2], cells), device=x.device) * cells.stride - cells.before
    token = first[:, None] + torch.arange(cells.width, device=x.device)
    return ((token >= 0) & (token < x.shape[2]))[None]


class Places(NamedTuple):
    """Of each entry [B, E]: the row at which its sequence starts, its first token there, how many there are, and
    whether there is such an entry."""

    start: Tensor
    first: Tensor
    tokens: Tensor
    inside: Tensor

    def holds(self, cells: Cells) -> Tensor:
        """Which tokens of its cell are there: bool [B, E, width]."""
        token = self.first[:, :, None] + torch.arange(cells.width, device=self.first.device)
        return self.inside[:, :, None] & (token >= 0) & (token < self.tokens[:, :, None])


def _cell_places(x: Tensor, cells: Cells, layout: Layout, spans: Tensor) -> Places:
    packed = is_packed(x, layout)
    entries = entry_spans(spans, cells, packed)
    number = torch.arange(entry_room(x, cells, layout), device=x.device, dtype=torch.int32)
    if not packed:
        first = (number * cells.stride - cells.before).expand(len(spans), -1)
        return Places(spans[:, :1].long(), first, spans[:, 1:], number < entries[:, 1:])
    ends = entries.sum(1, dtype=torch.int32)
    sequence = torch.searchsorted(ends, number, right=True).clamp(max=len(spans) - 1)
    first = (number - entries[sequence, 0]) * cells.stride - cells.before
    start, tokens = spans[sequence].long().unbind(1)
    return Places(start[None], first[None], tokens[None], (number < ends[-1])[None])


def _tokens_at(x: Tensor, index: Tensor) -> Tensor:
    """x [B, H, M, D] at rows [B, E, n] -> [B, H, E, n, D]; rows outside of x are read at its ends."""
    places = index.clamp(0, max(0, x.shape[2] - 1)).flatten(1)[:, None, :, None]
    found = x.gather(2, places.expand(-1, x.shape[1], -1, x.shape[3]))
    return found.view(*found.shape[:2], *index.shape[1:], x.shape[3])


def compress(x: Tensor, cells: Cells, layout: Layout, pool: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
    """x [B, H, M, D] -> entries [B, H, E, D]; past the last entry 0, and a gradient there is not read."""
    entries = pool(cells_of(x, cells, layout), cells_there(x, cells, layout))
    if layout.k_spans is None:
        return entries
    inside = _cell_places(x, cells, layout, layout.k_spans).inside
    return entries.masked_fill(~inside[:, None, :, None], 0)


def present(c: Tensor, there: Tensor | None, absent: float = -torch.inf) -> Tensor:
    """`absent` where a token is not there."""
    return c if there is None else c.masked_fill(~there[:, None, :, :, None], absent)
