"""One layer's call: its inputs, the lists that the module chooses, its rows piece by piece."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import lcm
from types import ModuleType

from torch import Tensor

from spdsl.diagnosis.piece import Piece, Streams, of_tiles, piece
from spdsl.ir.pattern import Case, Choice, Pattern, Phase, Softmax, Weight
from spdsl.ir.pattern import Tensor as TensorInput
from spdsl.oracle.dense import sizes_of
from spdsl.oracle.sizes import Sizes

_PAIRS = 2**18  # of queries and keys, over all heads, that are there at once: 2 MiB for a tensor of float64


class LayerCall:
    """One layer's call: its inputs, and the lists that the module chooses."""

    def __init__(self, pattern: Pattern, module: ModuleType, phase: str, inputs: Mapping[str, Tensor]) -> None:
        self.pattern, self.phase, self.sizes = pattern, phase, sizes_of(pattern, inputs)
        self.inputs = dict(inputs)
        self.lists = _lists(pattern, module, phase, inputs)

    @property
    def rows(self) -> int:
        return self.sizes.rows * self.sizes.batch

    def sequence(self, number: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Inputs and lists of one sequence, as a batch of 1."""
        own = {name: self._own(name, x, number) for name, x in self.inputs.items()}
        lists = {name: x[number : number + 1] for name, x in self.lists.items()}
        return own, lists

    def pieces(self, number: int) -> Iterator[tuple[Piece, Tensor, range]]:
        """Of one sequence: some rows, their output, and which they are."""
        choices = {one.name: one for one in self.pattern.inputs if isinstance(one, Choice)}
        whole = replace(self.sizes, batch=1)
        inputs, lists = self.sequence(number)
        inputs |= {name: of_tiles(choices[name], x, whole) for name, x in lists.items()}
        streams = Streams(self.pattern, inputs)
        for rows in _pieces(whole, self._grain()):
            one = piece(self.pattern, inputs, whole, rows, streams, self.phase == "decode")
            yield one, _answer(self, one), rows
            one.reads.clear()  # a call and its tables hold each other: its maps would wait for the collector

    def _grain(self) -> int | None:
        """Rows that vote together on tiles, or lie in a cell; None: each has a level of its own, that of its length."""
        steps = [step for case in self.pattern.cases_of(Phase(self.phase)) for step in self.pattern.steps(case)]
        softmaxes = [step for step in steps if isinstance(step, Softmax)]
        skips = [step.skip for step in softmaxes if step.skip is not None]
        if skips and self.phase == "decode":
            return None
        return lcm(*(step.rows for step in softmaxes), *(skip.rows for skip in skips))

    def _own(self, name: str, x: Tensor, number: int) -> Tensor:
        found = next((one for one in self.pattern.inputs if one.name == name), None)
        shared = isinstance(found, Weight) or (isinstance(found, TensorInput) and x.dim() == len(found.axes))
        return x if shared or x.shape[0] == 1 else x[number : number + 1]


def _lists(pattern: Pattern, module: ModuleType, phase: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `choices` of the module gives: int32 [B, heads, N, n]."""
    if not any(isinstance(one, Choice) and one.selected for one in pattern.inputs):
        return {}
    if phase == "decode" and any(isinstance(one, Choice) and one.tiled for one in pattern.inputs):
        raise ValueError(
            f"{pattern.name}: choices for tiles of queries are not measured in decode; ask for --phase prefill"
        )
    asked = inspect.signature(module.choices).parameters
    given = {name: x for name, x in inputs.items() if name in asked}
    found: dict[str, Tensor] = module.choices(**given, phase=phase)
    return found


def _pieces(sizes: Sizes, grain: int | None) -> Iterator[range]:
    """Rows whose pairs with keys, of all heads, are at most _PAIRS, but whole tiles of `grain`; None: one row."""
    rows = max(1, _PAIRS // (sizes.heads * sizes.keys))
    rows = 1 if grain is None else -(-rows // grain) * grain
    first = 0
    while first < sizes.rows:
        end = (sizes.q_origin + first) // rows * rows + rows - sizes.q_origin
        yield range(first, min(sizes.rows, end))
        first = end


def _answer(call: LayerCall, one: Piece) -> Tensor:
    """The output of the rows of a piece."""
    for case in call.pattern.cases_of(Phase(call.phase)):
        if _holds(one, case):
            out, _ = one.branch(case.branch)
            return out
    raise ValueError(f"{call.pattern.name}: no result covers this call in the phase {call.phase}")


def _holds(one: Piece, case: Case) -> bool:
    held = one.holds(case)
    if bool(held.all()) != bool(held.any()):
        raise ValueError(f"{one.pattern.name}: its results change within the call; ask for --phase prefill or train")
    return bool(held.all())
