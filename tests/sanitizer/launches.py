"""One launch under the sanitizer: which accesses its programs may make, and which they have made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import numpy as np
from torch import Tensor

from tests.sanitizer.faults import Access, Fault, lines
from tests.sanitizer.poison import unwritten_values
from tests.sanitizer.views import WINDOW, Array, View, key_of

_NOBODY, _SEVERAL = -1, -2


class Users:
    """For each byte of each memory the program that uses it, by its number."""

    def __init__(self) -> None:
        self._of: dict[int, Array] = {}

    def of(self, view: View) -> Array:
        if view.memory not in self._of:
            self._of[view.memory] = np.full(view.x.untyped_storage().nbytes(), _NOBODY, dtype=np.int32)
        return self._of[view.memory]


class Launch:
    """Checks accesses of the running program; the first fault ends the launch."""

    def __init__(self, builder: Any, kernel: str, file: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self.builder, self.kernel, self.file = builder, kernel, file
        self.views: dict[Any, View] = {}
        for name, x in tensors:
            self.views.setdefault(key_of(x), View(name, x, len(self.views) + 1))
        self._numbered = {view.number: view for view in self.views.values()}
        self._writers, self._readers = Users(), Users()
        self.fault: Fault | None = None

    def accesses(self, kind: str, pointers: Array, mask: Array) -> list[Access]:
        """The active lanes, tensor by tensor; all lie inside."""
        tile = pointers.shape
        (lanes,) = np.nonzero(np.broadcast_to(mask, tile).ravel())
        pointers = pointers.ravel()[lanes].astype(np.int64)
        numbers = pointers >> WINDOW
        found = []
        for number in np.unique(numbers):
            if number not in self._numbered:
                self._fail(f"{kind} at {pointers[numbers == number][0]:#x}, far from every tensor of the launch")
            view, own = self._numbered[number], numbers == number
            offset, rest = np.divmod(pointers[own] - view.base, view.size)
            access = Access(kind, view, tile, lanes[own], offset)
            self._refuse(access, ~view.inside(offset) | (rest != 0), "no element of the tensor")
            found.append(access)
        return found

    def read(self, access: Access, values: Array) -> None:
        floating = access.view.x.is_floating_point()
        self._refuse(access, unwritten_values(values, floating), "nothing was ever written there")
        self._refuse(access, self._others(self._writers, access), "another program of the launch writes there")
        readers, program = self._readers.of(access.view), self._program()
        before = readers[access.byte]
        readers[access.byte] = np.where((before == _NOBODY) | (before == program), program, _SEVERAL)

    def write(self, access: Access) -> None:
        self._refuse(access, self._others(self._writers, access), "another program of the launch writes there, too")
        self._refuse(access, self._others(self._readers, access), "another program of the launch reads there")
        writers, lanes = self._writers.of(access.view), np.arange(len(access.lanes), dtype=np.int32)
        writers[access.byte] = lanes
        self._refuse(access, writers[access.byte] != lanes, "two lanes of the store have this address")
        writers[access.byte] = self._program()

    def refuse_atomic(self) -> NoReturn:
        self._fail("an atomic operation: the order of its sums is nobody's")

    def _others(self, users: Users, access: Access) -> Array:
        before = users.of(access.view)[access.byte]
        return (before != _NOBODY) & (before != self._program())

    def _program(self) -> int:
        (x, y, z), (_, height, depth) = self.builder.grid_idx, self.builder.grid_dim
        return int((x * height + y) * depth + z)

    def _refuse(self, access: Access, which: Array, wrong: str) -> None:
        if which.any():
            self._fail(access.described(which, wrong))

    def _fail(self, wrong: str) -> NoReturn:
        program = f"program {self.builder.grid_idx} of {self.builder.grid_dim}"
        self.fault = Fault("\n".join([f"{self.kernel}, {program}: {wrong}", *lines(self.file)]))
        raise self.fault
