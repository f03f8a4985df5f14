"""margins: how far below the running maximum each tile of queries and keys lies, in one pass without leaving any out.

A tile is left out at a level x <= 1 if every row's maximum in it is below its running maximum + log(x). So a tile that
is left out raises no row's maximum, and the running maximum over the kept tiles is that over all: one number for each
tile, the largest distance of its rows, says at which levels it is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf, sqrt

import torch
from torch import Tensor

_PAIRS = 2**20  # of queries and keys, over the heads of a group, that are there at once


@dataclass(frozen=True, slots=True)
class Rule:
    """rows x unit: queries and keys of a tile. restart: a run begins at keys divisible by it; 0: once.

    by_group: all heads of a group vote together. causal: keys up to the query's own.
    """

    rows: int = 128
    unit: int = 128
    restart: int = 0
    by_group: bool = False
    causal: bool = True
    scale: float | None = None
    """None: 1 / sqrt(dim)."""


def margins(rule: Rule, q: Tensor, k: Tensor, progress: Callable[[int, int], None] | None = None) -> Tensor:
    """For each tile with a visible pair the largest (maximum of a row in it - running maximum of that row), float64.

    q [B, Hq, N, D], k [B, Hkv, M, D]; the last query stands at the last key, tiles count from position 0. The first
    tile of a run is infinitely far above: it is never left out. -> [number of visible tiles of all sequences and heads,
    or groups], in no order that matters. Raises ValueError for shapes that do not fit and for NaN.
    """
    _check(rule, q, k)
    found = []
    parts = list(_parts(rule, q, k))
    for done, (rows, keys, first) in enumerate(parts, 1):
        found.append(_of_rows(rule, rows.double(), keys.double(), first))
        if progress is not None:
            progress(done, len(parts))
    return torch.cat(found)


def _check(rule: Rule, q: Tensor, k: Tensor) -> None:
    for name, x in (("q", q), ("k", k)):
        if x.dim() != 4 or 0 in x.shape:
            raise ValueError(f"{name}: expected [batch, heads, tokens, dim], none of them 0, got {list(x.shape)}")
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{name}: expected finite numbers")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k: expected batch, dim and heads that go with those of q, {list(q.shape)}, got {list(k.shape)}"
        )
    if rule.causal and q.shape[2] > k.shape[2]:
        raise ValueError(f"q: {q.shape[2]} queries and {k.shape[2]} keys, so the first queries would see nothing")


def _parts(rule: Rule, q: Tensor, k: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Rows [voting heads, rows, D] of one tile, the keys [1, M, D] of its kv head, the position of the first row."""
    group, origin = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    for batch in range(q.shape[0]):
        for head in range(k.shape[1]):
            heads = q[batch, head * group : (head + 1) * group]
            for first in range(origin // rule.rows * rule.rows, k.shape[2], rule.rows):
                begin, end = max(first, origin), min(first + rule.rows, k.shape[2])
                yield heads[:, begin - origin : end - origin], k[batch, head : head + 1], begin


def _of_rows(rule: Rule, rows: Tensor, keys: Tensor, first: int) -> Tensor:
    """The margins of the visible tiles of some rows, of each head or of all heads together."""
    positions = first + torch.arange(rows.shape[1])
    keys = keys[:, : int(positions[-1]) + 1] if rule.causal else keys
    tops = [_tops(rule, part, keys, own) for part, own in _pieces(rows, keys, positions)]
    top = torch.cat(tops, 1)  # [heads, rows, tiles of keys], -inf where nothing is visible
    before = torch.cat([_running(run) for run in torch.split(top, _run(rule, top.shape[2]), 2)], 2)
    margin = torch.where(top == -inf, -inf, torch.where(before == -inf, inf, top - before)).amax(1)
    seen = (top > -inf).any(1)
    if rule.by_group:
        margin, seen = margin.amax(0, keepdim=True), seen.any(0, keepdim=True)
    return margin[seen]


def _run(rule: Rule, tiles: int) -> int:
    return rule.restart // rule.unit if rule.restart else max(1, tiles)


def _running(top: Tensor) -> Tensor:
    """The maximum of the tiles before each."""
    before = torch.full_like(top, -inf)
    before[..., 1:] = top.cummax(-1).values[..., :-1]
    return before


def _pieces(rows: Tensor, keys: Tensor, positions: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    step = max(1, _PAIRS // (rows.shape[0] * keys.shape[1]))
    return zip(torch.split(rows, step, 1), torch.split(positions, step), strict=True)


def _tops(rule: Rule, rows: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
    """The largest visible logit of each row in each tile of keys: [heads, rows, tiles]."""
    scale = 1 / sqrt(rows.shape[2]) if rule.scale is None else rule.scale
    logits = rows @ keys.transpose(1, 2) * scale
    if rule.causal:
        logits = logits.masked_fill(torch.arange(keys.shape[1]) > positions[:, None], -inf)
    padded = torch.nn.functional.pad(logits, (0, -keys.shape[1] % rule.unit), value=-inf)
    tiles: Tensor = padded.view(*padded.shape[:2], -1, rule.unit).amax(3)
    return tiles
