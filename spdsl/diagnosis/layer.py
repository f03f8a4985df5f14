"""Sums over the rows of one layer: its whole result, its branches, its choices, where mass is lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from spdsl.diagnosis.call import LayerCall
from spdsl.diagnosis.measure import Lost, Overlap, Sums
from spdsl.diagnosis.piece import Piece, Read, of_rows
from spdsl.diagnosis.record import Chosen, Head
from spdsl.ir.pattern import Choice

_SIDE = 64  # tiles of the map of what is lost


def measure(call: LayerCall, into: LayerSums) -> Iterator[int]:
    """Adds up the rows of a call; yields how many are done."""
    choices = {one.name: one for one in call.pattern.inputs if isinstance(one, Choice)}
    units = {name: call.sizes.units(one.unit) for name, one in choices.items()}
    for number in range(call.sizes.batch):
        into.begin()
        _, lists = call.sequence(number)
        for one, out, rows in call.pieces(number):
            into.add(one, out, one.sizes.q_origin)
            for name, x in lists.items():
                into.add_lists(name, of_rows(choices[name], x, call.sizes, rows)[0], units[name])
            yield number * call.sizes.rows + rows.stop


class LayerSums:
    """Of one layer: the whole result, the branches of one that has several, and the choices."""

    def __init__(self, tokens: int) -> None:
        self.branches: dict[str | None, Sums] = {}
        self.choices: dict[str, tuple[Overlap, Tensor]] = {}
        self.lost = Lost.of(tokens, _SIDE)

    def begin(self) -> None:
        for sums in self.branches.values():
            sums.overlap.begin()
        for overlap, _ in self.choices.values():
            overlap.begin()

    def add(self, one: Piece, out: Tensor, first: int) -> None:
        """Rows from position `first` on, and their output."""
        reads = list({read.name: read for read in one.reads}.values())
        every = _together(reads, out)
        self._of(None, every)
        for read in reads if len(reads) > 1 else []:
            self._of(read.name, read)
        self.lost.add(every, first)

    def _of(self, name: str | None, read: Read) -> None:
        self.branches.setdefault(name, Sums(read.mass.shape[1])).add(read)

    def add_lists(self, name: str, lists: Tensor, units: int) -> None:
        """Rows of a choice, int32 [lists, rows, n], of so many units."""
        sets = torch.zeros(*lists.shape[:2], units + 1, dtype=torch.bool)
        sets.scatter_(2, lists.long().where(lists >= 0, units), True)
        overlap, number = self.choices.setdefault(name, (Overlap.of(len(sets)), torch.zeros(len(sets)).double()))
        overlap.add(sets[..., :-1])
        number += (lists >= 0).sum((1, 2))


def _together(reads: Sequence[Read], out: Tensor) -> Read:
    """What any softmax read, beside dense attention of the first one."""
    first = reads[0]
    read = torch.stack([one.read for one in reads]).any(0)
    return first._replace(read=read, out=out)


def heads_of(layer: int, sums: LayerSums) -> Iterator[Head]:
    for branch, of in sums.branches.items():
        for head in range(of.heads):
            kept, lost, by_group, read, together, possible, wrong, dense = (
                float(x[head])
                for x in (of.kept, of.missed, of.missed_by_group, of.read, of.together, of.possible, of.wrong, of.dense)
            )
            yield Head(
                layer, head, branch, kept / of.rows, lost / of.rows, by_group / of.rows,
                (wrong / dense) ** 0.5 if dense else 0.0, 1 - read / possible, together / read if read else None,
                of.overlap.means(head),
            )  # fmt: skip


def choices_of(layer: int, sums: LayerSums, rows: int) -> Iterator[Chosen]:
    for name, (overlap, number) in sums.choices.items():
        for head, units in enumerate(number.tolist()):
            yield Chosen(layer, name, head, units / rows, overlap.means(head))
