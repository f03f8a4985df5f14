"""Tokens, layouts, weights and pools for tests of compressed streams."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from spdsl.runtime.call.layouts import Options, layout_of
from spdsl.runtime.pools.table import POOLS
from spdsl.runtime.sequences import Layout

HEADS, DIM, HIDDEN = 2, 6, 5
LAYOUTS = ("dense", "short", "none", "packed", "packed inside", "one packed", "padded")
KINDS = ("mean", "max", "min", "weighted", "mlp", "softmax")
STREAMED = ("mean", "max", "min", "weighted")

PACKED = {"packed": [0, 9, 9, 12, 30, 37], "packed inside": [3, 14, 31], "one packed": [0, 37]}
LENGTHS = [0, 2, 11, 36, 37]

Weights = dict[str, Tensor]


class Case(NamedTuple):
    """Tokens [B, H, M, D] with NaN wherever no sequence has one; sequences as (batch rows, tokens)."""

    x: Tensor
    layout: Layout
    sequences: list[tuple[slice, slice]]


def case_of(kind: str, dtype: torch.dtype = torch.float64, dim: int = DIM) -> Case:
    torch.manual_seed(0)
    tokens = {"short": 3, "none": 0}.get(kind, 37)
    batch = {"padded": len(LENGTHS)}.get(kind, 1 if kind in PACKED else 2)
    x = torch.randn(batch, HEADS, tokens, dim, dtype=torch.float64).to(dtype)
    cu_seqlens, lengths, sequences = None, None, [(slice(None), slice(0, tokens))]
    if kind in PACKED:
        cu_seqlens = torch.tensor(PACKED[kind], dtype=torch.int32)
        sequences = [(slice(0, 1), slice(*bounds)) for bounds in pairwise(PACKED[kind])]
    if kind == "padded":
        lengths = torch.tensor(LENGTHS)
        sequences = [(slice(s, s + 1), slice(tokens - count, tokens)) for s, count in enumerate(LENGTHS)]
    used = torch.zeros(batch, tokens, dtype=torch.bool)
    for rows, own in sequences:
        used[rows, own] = True
    layout = layout_of(x, x, Options(cu_seqlens, lengths=lengths))
    return Case(x.masked_fill(~used[:, None, :, None], torch.nan), layout, sequences)


def dense(x: Tensor) -> Layout:
    return layout_of(x, x, Options())


def weights_of(kind: str, width: int, dtype: torch.dtype = torch.float64, dim: int = DIM) -> Weights:
    torch.manual_seed(1)
    shapes = {
        "weight": (HEADS, width),
        "position": (HEADS, width, dim),
        "up": (HEADS, width, dim, HIDDEN),
        "down": (HEADS, HIDDEN, dim),
    }
    roles = {"weighted": ["weight", "position"], "mlp": ["position", "up", "down"]}.get(kind, [])
    return {role: torch.randn(*shapes[role], dtype=torch.float64).to(dtype) for role in roles}


def pool_of(kind: str, weights: Weights, z: Callable[[], Tensor]) -> Callable[[Tensor, Tensor | None], Tensor]:
    pool = POOLS[kind].entries
    return lambda c, there: pool(c, there, z()) if kind == "softmax" else pool(c, there, *weights.values())
