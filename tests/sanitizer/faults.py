"""What is said of an access that is wrong: kernel, line, program, tensor, first lane, and what is wrong with it."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from tests.library import in_library
from tests.sanitizer.views import Array, View


class Fault(AssertionError):
    """An access that a GPU punishes, or answers with any number, and that the interpreter alone lets pass."""


class Access(NamedTuple):
    """The active lanes of a load or store that lie in one tensor: their numbers within the tile, and their offsets."""

    kind: str
    view: View
    tile: tuple[int, ...]
    lanes: Array
    offset: Array  # int64, in elements from the first of the tensor

    @property
    def byte(self) -> Array:
        """Of the memory that the tensor is a view of."""
        return self.offset * self.view.size + self.view.first_byte

    def described(self, which: Array, wrong: str) -> str:
        """`wrong` at the first of the lanes `which`."""
        first = int(np.nonzero(which)[0][0])
        lane = tuple(int(i) for i in np.unravel_index(int(self.lanes[first]), self.tile))
        offset = int(self.offset[first])
        element = self.view.element(offset)
        place = f"element {offset} from the first" if element is None else f"element {element}"
        return (
            f"{self.kind} of {self.view}: {wrong}, {int(which.sum())} of {len(self.lanes)} active lanes; "
            f"the first is lane {lane} of {list(self.tile)} at {place}"
        )


def lines(file: str) -> Iterator[str]:
    """The lines that are being run of a file with kernels and of the library, the innermost first."""
    frame: Any = sys._getframe()
    while frame is not None:
        own = frame.f_code.co_filename
        if own == file or in_library(own):
            text = linecache.getline(own, frame.f_lineno).strip()
            yield f"line {frame.f_lineno} in {frame.f_code.co_name}: {text}"
        frame = frame.f_back
