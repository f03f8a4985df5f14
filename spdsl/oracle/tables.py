"""What element expressions read by name, made when it is first read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from spdsl.ir.pattern import Choice, Pattern
from spdsl.ir.pattern import Tensor as TensorInput
from spdsl.oracle.evaluate import Table


class Tables(Mapping[str, Table]):
    """The tensors and choices of a pattern by name."""

    def __init__(self, pattern: Pattern, make: Callable[[TensorInput | Choice], Table]) -> None:
        self._inputs = {
            an_input.name: an_input for an_input in pattern.inputs if isinstance(an_input, TensorInput | Choice)
        }
        self._make = make
        self._made: dict[str, Table] = {}

    def __getitem__(self, name: str) -> Table:
        if name not in self._made:
            self._made[name] = self._make(self._inputs[name])
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._inputs)

    def __len__(self) -> int:
        return len(self._inputs)


def tensor_table(tensor: TensorInput, x: Tensor, q_origin: int) -> Table:
    """q_origin: the position of row 0, where a `query` axis begins."""
    if x.dim() == len(tensor.axes) and "token" not in tensor.axes:
        x = x.unsqueeze(0)
    if x.dim() != len(tensor.axes) + 1:
        axes = ", ".join(map(str, ("batch", *tensor.axes)))
        raise ValueError(f"{tensor.name}: expected [{axes}], got {list(x.shape)}")
    origin = tuple(q_origin if axis == "query" else 0 for axis in tensor.axes)
    return Table(x, tuple(axis == "kv_head" for axis in tensor.axes), origin)
