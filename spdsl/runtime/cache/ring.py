"""Storage of bounded size for sequences of any length: the first tokens stay, the others lie in a ring of pages.

Position and slot are two things: the page table of a sequence names the same pages again and again. What is overwritten
has left the window of the pattern, so that no query reads it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Ring(NamedTuple):
    """first: pages that stay. turning: pages of the ring. spare: tokens of a call, at most."""

    first: int
    turning: int
    spare: int

    @property
    def pages(self) -> int:
        """Pages of a sequence."""
        return self.first + self.turning

    def table(self, batch: int, width: int, device: torch.device | str) -> Tensor:
        """int32 [batch, width]: the page of each `page` positions.

        With 1 page that stays and 2 that turn, sequence 0 has 0 1 2 1 2 1 .. and sequence 1 has 3 4 5 4 5 4 ..
        """
        number = torch.arange(width, dtype=torch.int32, device=device)
        number = torch.where(number < self.first, number, (number - self.first) % self.turning + self.first)
        return number + torch.arange(batch, dtype=torch.int32, device=device)[:, None] * self.pages


def ring_of(sink: int, window: int, spare: int, page: int) -> Ring:
    """Room for the first `sink` tokens, and for the last `window` before any of `spare` new ones.

    From the first key of the first new query to the last new token there are window + spare - 1 tokens, which may begin
    and end within a page.
    """
    return Ring(-(-sink // page), -(-(window + spare) // page) + 1, spare)


def row_pages(rows: Tensor, ring: Ring) -> Tensor:
    """The pages of rows int64 [n], one row after the other: int64 [n * pages]"""
    return (rows[:, None] * ring.pages + torch.arange(ring.pages, device=rows.device)).flatten()


def slots_of(store: Tensor, batch: int, ring: Ring) -> Tensor:
    """The pages of all sequences [batch * pages + 1, heads, page, dim] as [batch, heads, slots, dim], a copy."""
    own = store[: batch * ring.pages].unflatten(0, (batch, ring.pages))
    slots: Tensor = own.transpose(1, 2).flatten(2, 3)
    return slots


def put_slots(store: Tensor, slots: Tensor, ring: Ring) -> None:
    """The inverse."""
    own = slots.unflatten(2, (ring.pages, store.shape[2])).transpose(1, 2).flatten(0, 1)
    store[: len(own)].copy_(own)
