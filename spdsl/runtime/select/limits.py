"""What only a call knows of the lists of a choice: numbers for each list, which stay on the device.

A list has its `most` best units at the most; where fewer pass the level, it is filled up to `least` of them. A count is
brought into the room that lists have: above `most` of the pattern it is that, and what is no number is 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spdsl.runtime.language import tl
from spdsl.runtime.launch.launch import wide
from spdsl.runtime.sequences import Layout, length_of
from spdsl.runtime.tiles.kernel import jit

LIMITS = tl.constexpr(3)  # numbers of a list: least, most, level

Number = Tensor | float


def list_limits(q: Tensor, layout: Layout, lists: int, room: int, least: Number, most: Number, level: Number) -> Tensor:
    """float64 [sequences, lists, 3]: least, most and level of each list; an integer is exact.

    Each number is a tensor [sequences or 1, lists or 1, 1, 1], or one for all. `room`: the width of a list.
    """
    sequences = q.shape[0] if layout.q_spans is None else len(layout.q_spans)
    limits = torch.empty(sequences, lists, LIMITS.value, dtype=torch.float64, device=q.device)
    counts = (_count(least, room, torch.ceil), _count(most, room, torch.floor))
    for i, number in enumerate((*counts, _level(level, q.dtype))):
        if isinstance(number, Tensor):
            limits[..., i] = number.detach().flatten(1)  # a choice has no gradient
        else:
            limits[..., i].fill_(number)
    return limits


def _count(number: Number, room: int, whole: Callable[[Tensor], Tensor]) -> Number:
    """From 0 to the room of a list; what is not whole is made so."""
    if not isinstance(number, Tensor):
        return min(number, room)
    if number.is_floating_point():
        number = whole(number.nan_to_num(0.0))
    return number.clamp(0, room)


def _level(level: Number, dtype: torch.dtype) -> Number:
    """In the type in which scores are compared; -0 is 0, and there is one NaN, which lies above all scores."""
    if not isinstance(level, Tensor):
        return level
    level = level.to(wide(dtype)) + 0.0
    return level.masked_fill(level.isnan(), torch.nan)


def first_heads(q: Tensor, lists: int) -> Tensor:
    """The first query head of each list, [1, lists, 1, 1]."""
    return (torch.arange(lists, device=q.device) * (q.shape[1] // lists)).view(1, -1, 1, 1)


def request_lengths(q: Tensor, k: Tensor, layout: Layout) -> Tensor:
    """`length` of the pattern, [sequences or 1, 1, 1, 1]."""
    length = length_of(q, k, layout)
    length = length if isinstance(length, Tensor) else torch.full((1,), length, device=q.device)
    return length.view(-1, 1, 1, 1)


@jit
def limits_of(limits, s, list_head):
    """Where the numbers of a list begin; programs of axis 1 are list heads."""
    return limits + (tl.cast(s, tl.int64) * tl.num_programs(1) + list_head) * LIMITS


@jit
def least_of(limits):
    return tl.load(limits).to(tl.int32)


@jit
def most_of(limits):
    return tl.load(limits + 1).to(tl.int32)


@jit
def level_of(limits):
    return tl.load(limits + 2)
