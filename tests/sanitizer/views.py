"""The tensors of a launch as kernels see them under the sanitizer: each in a window of pretended addresses of its own.

A pointer thus names its tensor however far off it is, and no access reaches memory before it was looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

Array = np.ndarray[Any, Any]
WINDOW = 44  # bits of a window, more than any offset of a test needs


class View:
    """One tensor: its elements by their distance from the first; gaps of the view and rows of others are none."""

    def __init__(self, name: str, x: Tensor, number: int) -> None:
        self.name, self.x, self.number = name, x, number
        self.base = (number << WINDOW) + (1 << WINDOW - 1)  # the middle: an offset may be negative
        self.size = x.element_size()
        self.memory = x.untyped_storage().data_ptr()
        self.first_byte = x.data_ptr() - self.memory
        self.offsets = np.unique(_offsets(x))
        self.dense = len(self.offsets) > 0 and self.offsets[-1] - self.offsets[0] + 1 == len(self.offsets)

    def inside(self, offset: Array) -> Array:
        """Which offsets (int64, in elements) are elements of the tensor."""
        if not len(self.offsets):
            return np.zeros(offset.shape, dtype=bool)
        if self.dense:
            return (offset >= self.offsets[0]) & (offset <= self.offsets[-1])
        place = np.searchsorted(self.offsets, offset)
        return self.offsets[np.minimum(place, len(self.offsets) - 1)] == offset

    def element(self, offset: int) -> tuple[int, ...] | None:
        """The first index with an offset, if there is one."""
        found = np.argwhere(_offsets(self.x) == offset)
        return tuple(int(i) for i in found[0]) if len(found) else None

    def __str__(self) -> str:
        return f"`{self.name}` {list(self.x.shape)} (strides {list(self.x.stride())})"


def _offsets(x: Tensor) -> Array:
    """The offset of every element, shaped like x."""
    found = np.zeros((), dtype=np.int64)
    for size, stride in zip(x.shape, x.stride(), strict=True):
        found = found[..., None] + np.arange(size, dtype=np.int64) * stride
    return found


def tensors_of(name: str, argument: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an argument of a kernel with their names; fields of a tuple follow a dot."""
    if isinstance(argument, Tensor):
        yield name, argument
    elif isinstance(argument, tuple):
        fields = getattr(argument, "_fields", range(len(argument)))
        for field, part in zip(fields, argument, strict=True):
            yield from tensors_of(f"{name}.{field}", part)


def key_of(x: Tensor) -> tuple[Any, ...]:
    """Equal for a tensor and for what the interpreter hands on in its place: the same memory under another object."""
    return x.data_ptr(), x.dtype, x.shape, x.stride()
