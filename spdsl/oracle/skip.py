"""The tiles that a running skip keeps, tile by tile as its definition says."""

from __future__ import annotations

import torch
from torch import Tensor

from spdsl.ir.skip import Skip
from spdsl.oracle.sizes import Sizes


def kept_tiles(skip: Skip, logits: Tensor, level: Tensor, sizes: Sizes) -> Tensor:
    """Of logits [B, Hq, N, M], -inf where hidden, and the level [B or 1, Hq or 1]: bool [B, Hq, row tiles, key tiles].

    Tiles are numbered from those of the first query and the first key. NaN counts as infinity.
    """
    logits = torch.where(logits.isnan(), torch.inf, logits)
    q, k = sizes.q_origin + torch.arange(sizes.rows), sizes.k_origin + torch.arange(sizes.keys)
    row_tiles, key_tiles = _numbers(q, skip.rows), _numbers(k, skip.unit)
    voters = 1 if skip.share == "head" else logits.shape[1] // sizes.kv_heads
    room = torch.where(level > 0, level.clamp(max=1.0).log(), -torch.inf).unsqueeze(-1)
    found = torch.zeros(*logits.shape[:2], len(row_tiles), len(key_tiles), dtype=torch.bool)
    for i, rows in enumerate(row_tiles):
        top = torch.full_like(logits[:, :, rows, 0], -torch.inf)
        run = None
        for j, keys in enumerate(key_tiles):
            own_run = (sizes.k_origin + int(keys[0])) // skip.restart if skip.restart else 0
            if own_run != run:
                run, top = own_run, torch.full_like(top, -torch.inf)
            greatest = logits[:, :, rows][..., keys].amax(-1)
            below = (greatest == -torch.inf) | (greatest < top + room)
            keeps = (~below).any(-1)
            keeps = keeps.view(len(keeps), -1, voters).any(2).repeat_interleave(voters, 1)
            found[:, :, i, j] = keeps
            top = torch.where(keeps.unsqueeze(-1), torch.maximum(top, greatest), top)
    return found


def without_dropped(skip: Skip, logits: Tensor, kept: Tensor, sizes: Sizes) -> Tensor:
    """The logits with -inf in the tiles that are left out."""
    row = (sizes.q_origin + torch.arange(sizes.rows)) // skip.rows - sizes.q_origin // skip.rows
    key = (sizes.k_origin + torch.arange(sizes.keys)) // skip.unit - sizes.k_origin // skip.unit
    return torch.where(kept[:, :, row][..., key], logits, -torch.inf)


def counted(skip: Skip, logits: Tensor, kept: Tensor, sizes: Sizes) -> Tensor:
    """int32 [B, Hq, row tiles, 2]: tiles that are kept, and tiles that any voter sees a logit of."""
    voters = 1 if skip.share == "head" else logits.shape[1] // sizes.kv_heads
    q, k = sizes.q_origin + torch.arange(sizes.rows), sizes.k_origin + torch.arange(sizes.keys)
    seen = torch.zeros_like(kept)
    for i, rows in enumerate(_numbers(q, skip.rows)):
        for j, keys in enumerate(_numbers(k, skip.unit)):
            some = (logits[:, :, rows][..., keys] != -torch.inf).flatten(2).any(2)
            seen[:, :, i, j] = some.view(len(some), -1, voters).any(2).repeat_interleave(voters, 1)
    return torch.stack([kept.sum(-1), seen.sum(-1)], -1).int()


def _numbers(positions: Tensor, size: int) -> list[Tensor]:
    """The indices of the positions in each tile of `size`."""
    tiles = positions // size
    return [(tiles == number).nonzero().squeeze(1) for number in range(int(tiles[0]), int(tiles[-1]) + 1)]
