"""Scores as results: reduced to heads, tiles of rows and units, and their divergence. Plain torch, in pieces of rows.

The work is O(rows * keys), or O(rows * keys of a list); a piece is computed again in the backward pass, so that no more
than one lives at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from spdsl.runtime.select.choose import ScoreShape, Selection, _pieces, _unit_scores

LogitRows = Callable[[int, int], Tensor]
Lse = Tensor | str | None  # "own": of the logits; None: the score is the logits
Side = tuple[LogitRows, Lse, int, Selection]  # and the heads


def _lse_of(x: Tensor, lse: Lse, first: int, end: int) -> Tensor | None:
    """Of the rows first..end - 1 with logits x."""
    if isinstance(lse, str):
        return torch.logsumexp(x, -1)
    return None if lse is None else lse[:, :, first:end]


def pooled_scores(logits: LogitRows, lse: Lse, shape: tuple[int, ...], grains: Selection) -> Tensor:
    """Scores [B, lists, row tiles, units]; where nothing is visible 0 for probabilities, -inf for logits."""
    sizes = ScoreShape(*shape)

    def piece(first: int, end: int) -> Tensor:
        x = logits(first, end)
        scores = _unit_scores(x, _lse_of(x, lse, first, end), first, sizes, grains)
        return scores if lse is None else scores.masked_fill(scores == -torch.inf, 0.0)

    found = [checkpoint(piece, first, end, use_reentrant=False) for first, end in _pieces(sizes, grains)]
    return torch.cat(found, 2)


def unit_products(q: Tensor, k: Tensor, chosen: Tensor, unit: int) -> tuple[Tensor, Tensor]:
    """Products of rows with the keys of their units alone, [B, Hq, N, n * unit], and the number of each key, -1: none.

    q is [B, Hq, N, D], k [B, Hk, M, D], chosen [B, H, N, n]; both H and Hk divide Hq.
    """
    keys = k.shape[2]
    heads = math.lcm(k.shape[1], chosen.shape[1])
    k, chosen = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, chosen))
    units = max(1, -(-keys // unit))
    k = torch.nn.functional.pad(k, (0, 0, 0, units * unit - keys))
    first = torch.arange(k.shape[0] * heads, device=q.device).view(-1, heads, 1, 1) * units
    at = first + chosen.long().clamp(0, units - 1)
    # Unlike that of an index, the gradient of an embedding is added in a fixed order.
    found = torch.nn.functional.embedding(at, k.reshape(-1, unit * k.shape[3]))
    found = found.view(*at.shape[:3], at.shape[3] * unit, k.shape[3])
    products = q.unflatten(1, (heads, -1)).movedim(2, 3) @ found.transpose(-1, -2)
    number = chosen.unsqueeze(-1) * unit + torch.arange(unit, device=q.device)
    number = number.masked_fill((chosen < 0).unsqueeze(-1) | (number >= keys), -1).flatten(3)
    products = products.movedim(3, 2).flatten(1, 2)
    return products, number.repeat_interleave(products.shape[1] // heads, 1)


def divergence(target: Side, score: Side, shape: tuple[int, ...], room: int = 0) -> Tensor:
    """KL(target || score) of every row, [B, lists, rows]; each side is (logits, lse, heads, grains).

    Both are distributions over the entries that the target sees; a row that sees none has 0. The gradient reaches the
    score only. `room`: numbers that a row takes for each entry besides its scores.
    """
    batch, rows, entries, units, q_origin, tokens = shape

    def side(part: Side, first: int, end: int) -> Tensor:
        logits, lse, heads, grains = part
        sizes = ScoreShape(batch, heads, rows, entries, units, q_origin, tokens)
        x = logits(first, end)
        return _unit_scores(x, _lse_of(x, lse, first, end), first, sizes, grains)

    def piece(first: int, end: int) -> Tensor:
        with torch.no_grad():
            wanted = side(target, first, end)
            seen = wanted > -torch.inf
            wanted = wanted.masked_fill(~seen, 0.0)
            total = wanted.sum(-1, keepdim=True)
            wanted = wanted / total.masked_fill(total == 0, 1.0)
        found = side(score, first, end)
        found = found if score[1] is None else torch.log(found)
        found = found.masked_fill(~seen, -torch.inf)
        empty = (total == 0) | ~seen.any(-1, keepdim=True)
        log_found = torch.log_softmax(found.masked_fill(empty, 0.0), -1)
        terms = torch.xlogy(wanted, wanted) - wanted * log_found.masked_fill(wanted == 0, 0.0)
        return terms.masked_fill(empty, 0.0).sum(-1)

    sizes = ScoreShape(batch, max(target[2], score[2], room), rows, entries, units, q_origin, tokens)
    found = [checkpoint(piece, first, end, use_reentrant=False) for first, end in _pieces(sizes, score[3])]
    return torch.cat(found, 2)
