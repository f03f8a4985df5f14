"""The gradient of a tensor that a bias reads, while its parts are added.

Each part is some sums, and says which elements of the tensor they belong to; torch adds them in one order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor


class BiasGradient:
    """The gradient of x [B or 1, axes] while its parts are added."""

    def __init__(self, x: Tensor) -> None:
        self._like = x
        self._exact = x.dtype if x.dtype.itemsize > 2 else torch.float32  # of sums
        self._owned: Tensor | None = None
        self._numbered: Tensor | None = None  # by number; what belongs nowhere is in front

    @cached_property
    def numbers(self) -> Tensor:
        """The number of each element, from 1 on: read in place of x, it tells which element was read, 0: none."""
        count, x = self._like.numel(), self._like
        kind = torch.int32 if count < 2**31 - 1 else torch.int64
        return torch.arange(1, count + 1, dtype=kind, device=x.device).view(x.shape)

    @property
    def elements(self) -> Tensor:
        """The gradient itself, for programs that own elements."""
        if self._owned is None:
            self._owned = self._like.new_zeros(self._like.shape, dtype=self._exact)
        return self._owned

    def add(self, sums: Tensor, places: Tensor) -> None:
        """Sums, each for the element of that number. The order of the sums decides that of the addition."""
        if self._numbered is None:
            self._numbered = self._like.new_zeros(self._like.numel() + 1, dtype=self._exact)
        sums, places = sums.flatten().to(self._exact), places.flatten().long()
        self._numbered.index_put_((places,), sums, accumulate=True)

    def add_tables(self, sums: Tensor, places: Tensor, axes: Sequence[int]) -> None:
        """Tables [.., heads * entries] over these axes of x, which begin at the elements `places` [.., heads]."""
        x, offsets = self.numbers, torch.zeros(1, dtype=torch.int64, device=self._like.device)
        for axis in axes:
            steps = torch.arange(x.shape[axis], device=x.device) * x.stride(axis)
            offsets = (offsets[:, None] + steps).flatten()
        places = places.view(*sums.shape[:-1], -1, 1).long()
        self.add(sums, torch.where(places > 0, places + offsets, 0))

    @property
    def total(self) -> Tensor:
        """Of all parts."""
        if self._numbered is None:
            return self.elements.to(self._like.dtype)
        found = self._numbered[1:].view(self._like.shape)
        found = found.clone() if self._owned is None else found + self._owned
        return found.to(self._like.dtype)
