"""The sets that are not conditions on positions: given lists and drawn units, as tables of members."""

from __future__ import annotations

import torch
from torch import Tensor

from spdsl.ir.pattern import Choice
from spdsl.ir.rule import Drawn
from spdsl.oracle.evaluate import Table

_BITS = 2**63 - 1


def given(choice: Choice, units: Tensor, first: int, tiles: int, most: int) -> Table:
    """Lists [B, heads, tiles, width], padded with -1 -> members, bool [B, heads, tiles, most]. Repeats are free.

    Row tile 0 of the lists is tile `first`; units from `most` on do not exist.
    """
    if units.dim() != 4 or units.shape[2] != tiles:
        raise ValueError(f"{choice.name}: expected [batch, heads, {tiles} row tiles, most], got {list(units.shape)}")
    number = torch.arange(most)
    members = torch.zeros(*units.shape[:3], most, dtype=torch.bool)
    for column in units.unbind(3):
        members |= column.unsqueeze(-1) == number
    return Table(members, (True, False, False), (0, first, 0))


def drawn(choice: Choice, heads: int, first: int, tiles: int, most: int, causal: bool) -> Table:
    """The members of `random` for the row tiles `first` to `first + tiles`: [1, heads, tiles, most].

    Of the units that the last row of a tile may see (without `causal`: the `most` of the sequence), the `count` of
    lowest hash of (seed, head, tile, unit); a tie goes to the lower unit. Tiles before position 0 hold nothing.
    """
    assert isinstance(choice.rule, Drawn)
    members = torch.zeros(1, heads, tiles, most, dtype=torch.bool)
    for tile in range(max(0, first), first + tiles):
        last_row = (tile + 1) * choice.rows - 1
        number = torch.arange(last_row // choice.unit + 1 if causal else most)
        key = _mixed(torch.arange(choice.rule.seed, choice.rule.seed + heads)).unsqueeze(1)
        order = _mixed(_mixed(key + tile) + number).sort(dim=1, stable=True).indices[:, : choice.count]
        for head, units in enumerate(order):
            members[0, head, tile - first, units[units < most]] = True
    return Table(members, (True, False, False), (0, first, 0))


def _mixed(x: Tensor) -> Tensor:
    """A hash of int64 to 63 bits, the lowest 0: add, then shift and multiply twice, modulo 2**63."""
    x = (x + 0x1E3779B97F4A7C15) & _BITS
    for shift, factor in ((30, 0x3F58476D1CE4E5B9), (27, 0x14D049BB133111EB)):
        x = (x ^ (x >> shift)) * factor & _BITS
    return (x ^ (x >> 31)) & (_BITS - 1)
