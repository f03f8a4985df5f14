"""A term of a random pattern evaluated pair by pair, tile by tile: what the symbolic analyses are held against."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch
from torch import Tensor

from spdsl.diagnostics import Report, Source, SpatError
from spdsl.ir.pattern import Choice, Pattern
from spdsl.ir.pattern import Tensor as TensorInput
from spdsl.ir.plan import Plan
from spdsl.ir.symbols import H, K, Q, lookup, lookup_name, lookups
from spdsl.ir.visit import Range
from spdsl.oracle.dense import Sizes, environment
from spdsl.oracle.evaluate import Environment, Table, evaluate
from spdsl.passes.check import check
from spdsl.passes.lower import lower
from spdsl.passes.partition import partition
from spdsl.syntax.parse import parse
from tests.passes.random_sets import HEADER, Setting

TOO_MUCH = {"E305", "E307"}  # never holds, too many cases: refused for good reason, nothing left to test


def planned(text: str, causal: bool) -> Plan | None:
    """The plan of `attend(text)`; None if the set is refused as empty or too complex."""
    source = Source(f"pattern p {{ {HEADER} {'causal' if causal else ''} return attend({text}) }}")
    report = Report(source)
    try:
        pattern = lower(parse(source, report).patterns[0], report)
        report.check()
        assert pattern is not None
        check(pattern, report)
        report.check()
    except SpatError as error:
        refused = {one.code for one in error.diagnostics if one.severity.value == "error"}
        if refused <= TOO_MUCH:
            return None
        raise
    return partition(pattern, source)


@dataclass(frozen=True)
class Tiles:
    """Positions cut in tiles of `size`, the last one short."""

    first: int
    count: int
    size: int

    @property
    def starts(self) -> Tensor:
        return self.first + torch.arange(0, self.count, self.size)

    @property
    def ends(self) -> Tensor:
        """The last position of each tile."""
        return (self.starts + self.size - 1).clamp(max=self.first + self.count - 1)

    def any(self, mask: Tensor, dim: int) -> Tensor:
        return torch.stack([part.any(dim) for part in mask.split(self.size, dim)], dim)

    def all(self, mask: Tensor, dim: int) -> Tensor:
        return torch.stack([part.all(dim) for part in mask.split(self.size, dim)], dim)


class Case:
    """One pattern at one setting."""

    def __init__(self, pattern: Pattern, setting: Setting) -> None:
        self.pattern, self.s = pattern, setting
        sizes = Sizes(1, setting.heads, setting.kv_heads, setting.rows, setting.keys, setting.origin, 0)
        self.around = environment(pattern, setting.values, sizes)

    def mask(self, test: sympy.Basic) -> Tensor:
        """[H, N, M]"""
        return evaluate(test, self.around).expand(1, self.s.heads, self.s.rows, self.s.keys)[0]

    def on(self, **symbols: Tensor) -> Environment:
        """Other symbols beside h and length; [H, T, 1] or the like."""
        made = {name: value.view(1, *value.shape) for name, value in symbols.items()}
        return Environment({**self.around.symbols, **made}, self.around.tables, self.s.heads)

    def spans(self, one: Range, around: Environment, positions: Tensor, tiles: int) -> tuple[Tensor, Tensor, Tensor]:
        """Which positions each tile visits, which it takes as full [H, T, positions], and `first` [H, T]."""

        def value(expr: sympy.Basic) -> Tensor:
            return evaluate(expr, around).expand(1, self.s.heads, tiles, 1)[0]

        inside = value(one.condition) & (positions >= value(one.first)) & (positions < value(one.end))
        full = value(one.full) & (positions >= value(one.full_first)) & (positions < value(one.full_end))
        return inside, full & inside, value(one.first)[..., 0]

    def settled(self, test: sympy.Basic, rows: Tiles, keys: Tiles) -> Tensor:
        """`may` or `must` for all tiles: [H, row tiles, key tiles]; extremes of tensors taken over true tiles."""
        across, down = rows.starts.view(1, -1, 1), keys.starts.view(1, 1, -1)
        around = self.on(
            q_first=across, q_last=rows.ends.view(1, -1, 1), k_first=down, k_last=keys.ends.view(1, 1, -1),
            q=torch.arange(len(rows.starts)).view(1, -1, 1), k=torch.arange(len(keys.starts)).view(1, 1, -1),
        )  # fmt: skip
        tables = dict(self.around.tables)
        for number, read in enumerate(lookups(test)):
            name, _, end = lookup_name(read).partition(".")
            found = next(an_input for an_input in self.pattern.inputs if an_input.name == name)
            if end and isinstance(found, TensorInput) and found.by_row:
                tables[str(number)] = self._pair_extremes(name, read, end == "low", rows, keys)
                test = test.xreplace({read: lookup(str(number), H, Q, K)})
            elif end:
                tables[str(number)] = self._extremes(self.around.tables[name], read, end == "low", rows, keys)
                test = test.xreplace({read: lookup(str(number), *read.args)})
        shape = (1, self.s.heads, len(rows.starts), len(keys.starts))
        return evaluate(test, Environment(around.symbols, tables, self.s.heads)).expand(shape)[0]

    def _extremes(self, table: Table, read: sympy.Basic, low: bool, rows: Tiles, keys: Tiles) -> Table:
        """`doc.low(k)`: doc's least value over each tile; `doc.low()`: over all of doc and the 0 beyond its ends."""
        pick = torch.Tensor.amin if low else torch.Tensor.amax
        if not read.args:
            data = table.data.double().flatten()
            return Table(pick(torch.cat([data, data.new_zeros(1)]), 0).view(1), (), ())
        choice = self.pattern.choice(lookup_name(read).partition(".")[0])
        if choice is not None:
            return self._map_extremes(choice, table, low, rows, keys)
        data = table.data.to(torch.float64)
        names = [argument.name for argument in read.args]
        for axis, name in enumerate(names, 1):
            if name in ("q", "k"):
                data = self._tiled(data, axis, low, rows if name == "q" else keys)
        return Table(data, table.grouped, table.origin)

    def _pair_extremes(self, name: str, read: sympy.Basic, low: bool, rows: Tiles, keys: Tiles) -> Table:
        """`pair.low(q, k)`: the least of pair[q][k] over the pairs of each tile."""
        numbers = evaluate(lookup(name, *read.args), self.around).double()
        numbers = numbers.expand(1, self.s.heads, self.s.rows, self.s.keys)
        for axis, tiles in ((2, rows), (3, keys)):
            parts = numbers.split(tiles.size, axis)
            numbers = torch.stack([part.amin(axis) if low else part.amax(axis) for part in parts], axis)
        return Table(numbers, (False,) * 3, (0,) * 3)

    def _tiled(self, data: Tensor, axis: int, low: bool, tiles: Tiles) -> Tensor:
        found = []
        for start, end in zip(tiles.starts.tolist(), tiles.ends.tolist(), strict=True):
            inside = [x for x in range(start, end + 1) if 0 <= x < data.shape[axis]]
            part = data.index_select(axis, torch.tensor(inside, dtype=torch.long))
            if len(inside) <= end - start:
                part = torch.cat([part, torch.zeros_like(data.narrow(axis, 0, 1))], axis)
            found.append(part.amin(axis) if low else part.amax(axis))
        return torch.stack(found, axis)

    def _map_extremes(self, choice: Choice, table: Table, low: bool, rows: Tiles, keys: Tiles) -> Table:
        """Over rectangles of (row tiles, units) of a membership map."""
        data = table.data
        for axis, tiles, size in ((2, rows, choice.rows), (3, keys, choice.unit)):
            origin, found = table.origin[axis - 1], []
            for start, end in zip((tiles.starts // size).tolist(), (tiles.ends // size).tolist(), strict=True):
                part = data.narrow(axis, start - origin, end - start + 1)
                found.append(part.all(axis) if low else part.any(axis))
            data = torch.stack(found, axis)
        return Table(data, table.grouped, (0, 0, 0))
