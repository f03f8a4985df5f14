"""A call for a few of its rows, which remembers what each softmax read: the reference, run piece by piece."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import sympy
import torch
from torch import Tensor

from spdsl.ir.pattern import Choice, Pattern, Query, Softmax, Term
from spdsl.ir.pattern import Tensor as TensorInput
from spdsl.ir.skip import Skip
from spdsl.ir.symbols import K, Q
from spdsl.oracle.call import Call
from spdsl.oracle.products import multiplied
from spdsl.oracle.sizes import Sizes, sizes_of
from spdsl.oracle.skip import kept_tiles, without_dropped
from spdsl.oracle.softmax import Part, normalised


class Read(NamedTuple):
    """What one softmax read of some rows. Of a stream of tokens with all its causal keys: the dense softmax."""

    name: str
    mass: Tensor  # of dense attention on each key, float64 [B, Hq, rows, M]; a row is 1
    read: Tensor  # bool, as mass
    open: Tensor  # the keys of dense attention, bool [1, 1, rows, M]
    out: Tensor  # [B, Hq, rows, Dv]
    dense: Tensor  # the output of dense attention
    group: int  # query heads of a kv head


class Streams:
    """Keys and values of a whole call in float64, made once."""

    def __init__(self, pattern: Pattern, inputs: Mapping[str, Tensor]) -> None:
        self._call = Call(pattern, inputs, sizes_of(pattern, inputs))
        self._made: dict[tuple[str, str], Tensor] = {}

    def keys(self, name: str) -> Tensor:
        return self._once("k", name)

    def values(self, name: str) -> Tensor:
        return self._once("v", name)

    def _once(self, side: str, name: str) -> Tensor:
        if (side, name) not in self._made:
            self._made[side, name] = self._call.keys(name) if side == "k" else self._call.values(name)
        return self._made[side, name]


@dataclass(frozen=True, slots=True)
class Piece(Call):
    """With `causal` it holds no key behind its last row. `alone`: every row is the last token of its sequence."""

    streams: Streams
    alone: bool
    reads: list[Read] = field(default_factory=list)

    def entries(self, name: str | None) -> int:
        whole = Call.entries(self, name)
        if not self.short:
            return whole
        grid = None if name is None else self.stream(name).grid
        end = self.sizes.q_origin + self.sizes.rows
        return min(whole, end if grid is None else -(-(end + grid.before) // grid.stride))

    @property
    def short(self) -> bool:
        return self.pattern.causal or self.alone

    def around(self, stream=None, heads=None, query=None):  # type: ignore[no-untyped-def]
        found = Call.around(self, stream, heads, query)
        if not self.alone:
            return found
        return replace(found, symbols={**found.symbols, "length": found.symbols["q"] + 1})

    def products(self, softmax: Softmax, q: Tensor, k: Tensor) -> Tensor:
        """The rows of a group one after another: no copy of the keys for each head."""
        found = multiplied(softmax.product, _by_group(q, k.shape[1]), k)
        return found.view(*q.shape[:3], k.shape[2])

    def keys(self, name: str) -> Tensor:
        return self.streams.keys(name)[:, :, : self.entries(name)]

    def values(self, name: str) -> Tensor:
        return self.streams.values(name)[:, :, : self.entries(name)]

    def softmax(self, softmax: Softmax) -> Part:
        """As its definition says, and noted down."""
        first = next((term for term in softmax.terms if self._of_tokens(term)), softmax.terms[0])
        name = first.stream if self._of_tokens(first) else self._source(first.stream)
        return self._noted(softmax, name)

    def _noted(self, softmax: Softmax, name: str) -> Part:
        dense_logits, open_keys = self._dense(softmax, name)
        read = torch.zeros_like(dense_logits, dtype=torch.bool)
        logits, values = [], []
        for term in softmax.terms:
            seen = self.visible(softmax, term)
            if self.alone:
                seen = seen & self._closed(term.stream)
            whole = dense_logits if term.stream == name else self.logits(softmax, replace(term, test=sympy.true))
            if softmax.skip is not None:
                seen = seen & self._kept(softmax, softmax.skip, torch.where(seen, whole, -torch.inf))
            if self._of_tokens(term):
                read |= seen
            logits.append(torch.where(seen, whole, -torch.inf))
            values.append(self.values(term.stream))
        part = self._normalised(softmax, logits, values)
        out, _ = self._normalised(softmax, [dense_logits], [self.values(name)])
        mass = torch.softmax(dense_logits, -1)
        group = mass.shape[1] // self.streams.keys(name).shape[1]
        if softmax.rows > 1:  # each query has the row of its cell
            cell = self.sizes.cell_of_rows(softmax.rows)
            mass, read, out, *own = (x[:, :, cell] for x in (mass, read, out, *part))
            part = own[0], own[1]
        self.reads.append(Read(softmax.name, mass, read, open_keys, part[0], out, group))
        return part

    def _dense(self, softmax: Softmax, name: str) -> tuple[Tensor, Tensor]:
        """Logits of dense attention over a stream of tokens, and where there is a key."""
        test = K <= Q if self.short else sympy.true
        logits = self.logits(softmax, Term(name, test))
        keys, rows = (torch.arange(n) for n in (self.entries(name), self.sizes.rows))
        seen = (
            keys <= (self.sizes.q_origin + rows).unsqueeze(1) if self.short else torch.ones(len(rows), len(keys)).bool()
        )
        return logits, seen.view(1, 1, len(rows), len(keys))

    def _kept(self, softmax: Softmax, skip: Skip, logits: Tensor) -> Tensor:
        """Pairs in tiles that the skip keeps, bool as the logits; rows are whole tiles."""
        level = self.of_lists(skip.level, logits.shape[1]).double()
        sizes = replace(self.sizes, keys=logits.shape[3])
        tiles = kept_tiles(skip, logits, level, sizes)
        return without_dropped(skip, torch.zeros_like(logits), tiles, sizes) == 0

    def _normalised(self, softmax: Softmax, logits: list[Tensor], values: list[Tensor]) -> Part:
        if softmax.sink is not None:
            sink = self.tables[softmax.sink].data.double()[:, :, None, None]
            logits = [*logits, sink.expand(self.sizes.batch, -1, logits[0].shape[2], 1)]
            values = [*values, values[0].new_zeros(*values[0].shape[:2], 1, values[0].shape[3])]
        kv_heads = max(x.shape[1] for x in values)
        every = torch.cat([x.repeat_interleave(kv_heads // x.shape[1], 1) for x in values], 2)
        out, lse = normalised(_by_group(torch.cat(logits, -1), kv_heads), every)
        shape = (*logits[0].shape[:3], -1)
        return out.reshape(shape), lse.reshape(shape[:3])

    def _of_tokens(self, term: Term) -> bool:
        return self.stream(term.stream).compress is None

    def _source(self, name: str) -> str:
        compress = self.stream(name).compress
        assert compress is not None
        return compress.source

    def _closed(self, name: str) -> Tensor:
        """Entries whose last token is there for a row: bool [1, 1, rows, entries]."""
        grid = self.stream(name).grid
        last = torch.arange(self.entries(name)) * grid.stride - grid.before + grid.width - 1
        rows = self.sizes.q_origin + torch.arange(self.sizes.rows)
        return (last <= rows.unsqueeze(1)).view(1, 1, len(rows), len(last))


def piece(
    pattern: Pattern, inputs: Mapping[str, Tensor], whole: Sizes, rows: range, streams: Streams, alone: bool
) -> Piece:
    """Rows of a call of one sequence; lists of choices for tiles of queries lie in one list for each tile."""
    sizes = replace(whole, rows=len(rows), q_origin=whole.q_origin + rows.start)
    own = {name: _cut(pattern, name, x, whole, sizes, rows) for name, x in inputs.items()}
    return Piece(pattern, own, sizes, streams, alone)


def _cut(pattern: Pattern, name: str, x: Tensor, whole: Sizes, sizes: Sizes, rows: range) -> Tensor:
    found = next((one for one in pattern.inputs if one.name == name), None)
    if isinstance(found, Choice):
        first = sizes.first_tile(found.rows) - whole.first_tile(found.rows)
        return x.narrow(2, first, sizes.tiles(found.rows))
    if isinstance(found, TensorInput) and found.by_row:
        return x.narrow(found.axes.index("query") - len(found.axes), rows.start, len(rows))
    if isinstance(found, Query) or name == "gates":
        return x.narrow(2, rows.start, len(rows))
    return x


def of_tiles(choice: Choice, lists: Tensor, sizes: Sizes) -> Tensor:
    """A list for each query [B, heads, N, n] as one for each tile of queries, which larger tiles have already."""
    if choice.rows == 1 or choice.tiled:
        return lists
    first = (sizes.first_tile(choice.rows) + torch.arange(sizes.tiles(choice.rows))) * choice.rows - sizes.q_origin
    return lists[:, :, first.clamp(min=0)]


def of_rows(choice: Choice, lists: Tensor, sizes: Sizes, rows: range) -> Tensor:
    """The lists of some queries; those of a tile have one."""
    if not choice.tiled:
        return lists[:, :, rows.start : rows.stop]
    position = sizes.q_origin + torch.arange(rows.start, rows.stop)
    return lists[:, :, position // choice.rows - sizes.first_tile(choice.rows)]


def _by_group(x: Tensor, kv_heads: int) -> Tensor:
    """[B, heads, rows, n] as [B, kv heads, heads of a group x rows, n]."""
    batch, heads, rows, n = x.shape
    return x.reshape(batch, kv_heads, heads // kv_heads * rows, n)
