"""Checking the arguments that selection and compression add: learned weights, and choices of the caller."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spdsl.runtime.select.choose import sorted_units
from spdsl.runtime.sequences import DTYPES, expect, expect_tensor


def check_weight(name: str, x: Tensor, sizes: Sequence[int | None], like: Tensor) -> None:
    """A learned tensor of these sizes (None: any), a floating point type, on the device of `like`."""
    expect_tensor(name, x)
    fits = x.dim() == len(sizes) and all(size is None or own == size for own, size in zip(x.shape, sizes, strict=False))
    expect(fits, name, "{}", list(x.shape), ["any" if size is None else size for size in sizes])
    expect(x.dtype in DTYPES, name, "float16, bfloat16, float32 or float64", x.dtype)
    expect(x.device == like.device, name, f"device {like.device}", x.device)


def chosen_argument(units: Tensor, lists: int, unit: int, keys: int, q: Tensor) -> Tensor:
    """Lists that `check_chosen` passed, int [B, lists, N, n] in any order, -1 for none -> ascending, each unit once.

    `keys`: of a sequence, at most.
    """
    units = units.expand(q.shape[0], lists, -1, -1)
    return sorted_units(units, max(1, -(-keys // unit)))


def check_chosen(name: str, units: Tensor, lists: int, q: Tensor, most: int | None = None) -> None:
    expect_tensor(name, units)
    expect(units.dtype in (torch.int32, torch.int64), name, "int32 or int64", units.dtype)
    expect(units.device == q.device, name, f"device {q.device}", units.device)
    fits = units.dim() == 4 and units.shape[0] in (1, q.shape[0]) and units.shape[1] in (1, lists)
    fits = fits and units.shape[2] == q.shape[2]
    expect(fits, name, "[{}, {}, {}, units]", list(units.shape), q.shape[0], lists, q.shape[2])
    expect(most is None or units.shape[3] <= most, name, "at most {} units in a list", units.shape[3], most)
