"""Memory that nobody wrote holds a value that no computation gives: reading it shows, and so does copying it.

Floats are NaN with all bits set (arithmetic makes another NaN), integers and bools repeat a byte. So an element is
written once anything else is there, whoever wrote it: a kernel, torch, or a copy of what was written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

_BYTE = 0x5A  # of integers
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MAKERS = (
    (torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"),
    (Tensor, "new_empty"), (Tensor, "new_empty_strided"),
)  # fmt: skip


def _poison_of(floating: bool, size: int) -> int:
    return -1 if floating else int.from_bytes([_BYTE] * size, "little")


def poison(x: Tensor) -> Tensor:
    """Marks every element as never written; other devices and tensors without memory are left alone."""
    if type(x) is Tensor and x.device.type == "cpu" and x.numel() and not x.is_complex():
        bits = x.detach().view(_BITS[x.element_size()])
        bits.fill_(_poison_of(x.is_floating_point(), x.element_size()))
    return x


def unwritten(x: Tensor) -> Tensor:
    """Which elements nobody wrote, bool like x."""
    bits = x.detach().view(_BITS[x.element_size()])
    return bits == _poison_of(x.is_floating_point(), x.element_size())


def unwritten_values(values: np.ndarray[Any, Any], floating: bool) -> np.ndarray[Any, Any]:
    """The same of numbers that a kernel has loaded from a tensor of that kind."""
    bits = values.view(f"i{values.itemsize}" if values.itemsize > 1 else "u1")
    return bits == _poison_of(floating, values.itemsize)


def poison_what_is_allocated(patch: pytest.MonkeyPatch) -> None:
    """torch.empty and its kin give poisoned memory until `patch` ends."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: poison(make(*args, **kwargs))

    for owner, name in _MAKERS:
        patch.setattr(owner, name, poisoned(getattr(owner, name)))
