"""Short units on CPU tensors: neighbours meet the rows together, so that products are worth their overhead.

A pair of a row and a unit costs about as much as a product with PAIR_KEYS keys, beside the keys of the unit: its result
is written and gathered again. Which of the units of a whole one a row chose is a mask of bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spdsl.runtime.tuning.unit_configs import LEAST_KEYS

PAIR_KEYS = 64  # measured at a head dim of 64, one thread: 1.1 us for a pair, 15 ns for a key of a dense product
_MOST = 64  # bits of a mask


def units_together(unit: int, listed: int, keys: int) -> int:
    """How many neighbouring units, a power of two, are taken together where lists hold `listed` of them.

    Sizes alone decide: a list may hold units of as many whole ones as there are.
    """
    if unit >= LEAST_KEYS:
        return 1
    each = (1 << i for i in range(_MOST.bit_length()))
    return min(each, key=lambda per: min(listed, -(-keys // (unit * per))) * (unit * per + PAIR_KEYS))


def taken_together(chosen: Tensor, per: int, units: int, most: int) -> tuple[Tensor, Tensor]:
    """Lists [rows, n] of distinct units below `units` -> whole ones of `most`, and their masks: both [rows, most]."""
    none = (chosen < 0) | (chosen >= units)
    place = (chosen // per).masked_fill(none, most)
    masks = chosen.new_zeros(len(chosen), most + 1).scatter_add_(1, place, 1 << chosen % per)  # distinct bits
    masks = masks[:, :most].contiguous()
    return torch.arange(most).expand_as(masks).masked_fill(masks == 0, -1), masks
