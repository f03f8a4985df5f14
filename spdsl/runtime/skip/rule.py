"""The vote of a running skip in torch: which tiles of queries and keys a softmax keeps, in the order of keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spdsl.runtime.sequences import Layout, expect


class SkipRule(NamedTuple):
    """What a pattern says. A tile is `rows` queries times `unit` keys, by their positions, of one head, or (`by_group`)
    of all query heads of a kv head.

    level: of (heads [1, Hq, 1, 1], length, ...), which a number of a tile must not lie below, as a part of the running
    maximum's weight. That begins anew at keys that `restart` divides; 0: never.
    """

    level: Callable[..., Any]
    rows: int
    unit: int
    restart: int = 0
    by_group: bool = False

    def room(self, heads: int, length: Any, own: tuple[Any, ...], like: Tensor) -> Tensor:
        """log(min(level, 1)), [B or 1, Hq or 1, 1] in the type of `like`; -inf where the level is not above 0."""
        h = torch.arange(heads, device=like.device).view(1, -1, 1, 1)
        level = torch.as_tensor(self.level(h, length, *own), device=like.device, dtype=torch.float64)
        level = level.reshape(1, 1, 1) if level.dim() == 0 else level.squeeze(-1)
        return torch.where(level > 0, level.clamp(max=1.0).log(), -torch.inf).to(like.dtype)


class Running(NamedTuple):
    """The greatest logit of each row over the tiles kept so far [B, Hq, rows], and the run that it belongs to."""

    top: Tensor
    run: int = -1


def vote(
    rule: SkipRule, tops: Tensor, room: Tensor, tiles: Sequence[int], before: Running, kv_heads: int
) -> tuple[Tensor, Running]:
    """Which tiles are kept, bool [B, Hq, tiles], of the greatest logits [B, Hq, rows, tiles] as of `greatest`.

    `tiles` are their numbers from position 0 on, rising.
    """
    (top, run), heads, kept = before, tops.shape[1], []
    for i, tile in enumerate(tiles):
        own_run = tile * rule.unit // rule.restart if rule.restart else 0
        if own_run != run:
            top, run = torch.full_like(top, -torch.inf), own_run
        keeps = ((tops[..., i] > -torch.inf) & ~(tops[..., i] < top + room)).any(-1)
        if rule.by_group:
            keeps = keeps.unflatten(1, (kv_heads, -1)).any(2).repeat_interleave(heads // kv_heads, 1)
        top = torch.where(keeps.unsqueeze(-1), torch.maximum(top, tops[..., i]), top)
        kept.append(keeps)
    return torch.stack(kept, -1), Running(top, run)


def seen_by_voters(rule: SkipRule, tops: Tensor, kv_heads: int) -> Tensor:
    """Which tiles somebody who votes on them sees, bool [B, Hq, tiles], of the same logits."""
    seen, heads = (tops > -torch.inf).any(2), tops.shape[1]
    if rule.by_group:
        seen = seen.unflatten(1, (kv_heads, -1)).any(2).repeat_interleave(heads // kv_heads, 1)
    return seen


def greatest(logits: Tensor, unit: int) -> Tensor:
    """Of each tile of keys: [.., keys] -> [.., tiles]. -inf, what is hidden, is not seen; NaN counts as infinity."""
    tiles = torch.nn.functional.pad(logits, (0, -logits.shape[-1] % unit), value=-torch.inf)
    tops = tiles.unflatten(-1, (-1, unit)).amax(-1)
    return torch.where(tops.isnan(), torch.inf, tops)


def expect_whole_tiles(layout: Layout, unit: int) -> None:
    """A part of the keys begins with a tile."""
    expect(
        (layout.k_offset or 0) % unit == 0, "k_offset", "a multiple of {}, the keys of a tile", layout.k_offset, unit
    )
