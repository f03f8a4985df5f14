"""reads: how a tensor read of an element test is written, and which arguments carry the tensor.

In kernels a read goes through `t`, a tuple of pointers and strides; in torch text through `t`, a tuple of tensors.
Names: `t.doc` the data, `t.doc_0` the stride of its first axis, `t.tiles_first` the first row tile of a list. A token
axis is read below `length` alone: behind the last token of a sequence lie those of the next, or nothing.

A tensor with a `query` axis is read at positions, too: kernels get its data so moved that the row at position q lies at
place q, below `t.pair_rows`; torch adds `t.row_shift`. Its other axes are read within their own sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import sympy
from sympy.core.function import AppliedUndef

from spdsl.ir.interval import HIGH, LOW
from spdsl.ir.pattern import Choice, Tensor
from spdsl.ir.symbols import K, Q, lookup_name

Text = Callable[[sympy.Basic], str]
Source = Tensor | Choice
Place = tuple[str, tuple[sympy.Basic, ...]]  # the name of what is read, and at which indices


@dataclass(frozen=True, slots=True)
class Reads:
    """Prints the reads of one softmax. `sources` by the names in tests, each as the text writes it.

    bounds: of each read of which a tile map asks the extremes (its name and indices) the variable, `doc_k` for doc[k].
    """

    sources: Mapping[str, Source]
    bounds: Mapping[Place, str] = field(default_factory=dict)

    def triton(self, read: AppliedUndef, text: Text) -> str:
        source = self.sources[lookup_name(read)]
        if isinstance(source, Choice):
            return self._choice(source, read, text)
        pointer, there = self.pointer(read, text)
        found = f"tl.load({pointer}{f', mask={there}, other=0' if there else ''})"
        return f"rt.widened({found})" if source.by_row and source.dtype == "float" else found

    def pointer(self, read: AppliedUndef, text: Text) -> tuple[str, str]:
        """Where an element lies for a kernel, and whether there is one; "" where it is certain."""
        source = self.sources[lookup_name(read)]
        assert isinstance(source, Tensor)
        if source.by_row:
            return _of_row(source, read, text)
        name = source.name
        offsets, bounds, inside = [f"t.{name}"], list[str](), list[str]()
        for i, (axis, index) in enumerate(zip(source.axes, read.args, strict=True)):
            printed = text(index)
            if axis == "token":
                offsets.append(f"tl.cast({printed}, tl.int64) * t.{name}_{i}")
                bounds.append(f"({printed} >= 0) & ({printed} < length)")
            elif axis == "kv_head":
                offsets.append(f"tl.cast({printed} // t.{name}_group, tl.int64) * t.{name}_{i}")
            else:
                offsets.append(f"tl.cast({printed}, tl.int64) * t.{name}_{i}")
                inside += _within(index, printed, axis)
        return " + ".join(offsets), _mask(bounds + inside) if inside else " & ".join(bounds)

    def _choice(self, choice: Choice, read: AppliedUndef, text: Text) -> str:
        name = choice.name
        head, tile, _ = (text(index) for index in read.args)
        place = f"{head} // t.{name}_group, {tile} - t.{name}_first, {text(K)}, {choice.unit}"
        return f"rt.member(t.{name}, {place}, t.{name}_tiles, t.{name}_units)"

    def torch(self, read: AppliedUndef, text: Text) -> str:
        if lookup_name(read).endswith((LOW, HIGH)):
            place, end = _place(read)
            return f"{self.bounds[place]}_{end}"
        source = self.sources[lookup_name(read)]
        name = source.name
        if isinstance(source, Choice):
            head, tile, unit = (text(index) for index in read.args)
            return f"rt.read(t.{name}, {head} // t.{name}_group, {tile} - t.{name}_first, {unit})"
        return _torch_read(source, read, text)

    def of_inputs(self, read: AppliedUndef, text: Text) -> str:
        """In torch, of a tensor among the `inputs` of a call with `heads` query heads."""
        source = self.sources[lookup_name(read)]
        assert isinstance(source, Tensor)
        own = f"inputs.{source.name}"
        exact = own if source.dtype == "float" else f"{own}.long()"  # numbers of few bits would wrap
        if not source.axes:
            return f"{exact}.view(-1, 1, 1, 1)"
        indices = [
            f"{text(index)} // (heads // {own}.shape[{i}])" if axis == "kv_head" else text(index)
            for i, (axis, index) in enumerate(zip(source.axes, read.args, strict=True), 1)
        ]
        return f"rt.read({', '.join([exact, *indices])})"


def _of_row(tensor: Tensor, read: AppliedUndef, text: Text) -> tuple[str, str]:
    """The same of a tensor with a `query` axis."""
    name, offsets, bounds = tensor.name, [f"t.{tensor.name}"], list[str]()
    for i, (axis, index) in enumerate(zip(tensor.axes, read.args, strict=True)):
        printed = text(index)
        place = f"{printed} // t.{name}_group" if axis == "kv_head" else printed
        offsets.append(f"tl.cast({place}, tl.int64) * t.{name}_{i}")
        if axis == "query":
            bounds.append(f"({printed} < t.{name}_rows)")
        else:
            bounds += _within(index, printed, f"t.{name}_{i}_size" if axis == "token" else axis)
    return " + ".join(offsets), _mask(bounds)


def _within(index: sympy.Basic, printed: str, size: str | int) -> list[str]:
    """What holds where an index lies in an axis of that size; nothing for heads, and for an index that surely does."""
    if size in ("head", "kv_head"):
        return []
    low = [] if index.is_nonnegative else [f"({printed} >= 0)"]
    return low if isinstance(size, int) and _most(index) < size else [*low, f"({printed} < {size})"]


def _most(index: sympy.Basic) -> sympy.Basic:
    if isinstance(index, sympy.Min):
        return min(map(_most, index.args))
    if isinstance(index, sympy.Mod) and index.args[1].is_Integer:
        return index.args[1] - 1
    return index if index.is_Integer else sympy.oo


def _mask(bounds: list[str]) -> str:
    """Compared once more: the interpreter makes integers of one truth that meets a block of them."""
    return f"({' & '.join(bounds)}) != 0"


def _torch_read(tensor: Tensor, read: AppliedUndef, text: Text) -> str:
    return f"rt.read(t.{', '.join([tensor.name, *_indices(tensor, read, text)])})"


def _indices(tensor: Tensor, read: AppliedUndef, text: Text) -> list[str]:
    """One for each axis, in torch text."""
    axes = zip(tensor.axes, map(text, read.args), strict=True)
    ways = {"kv_head": f" // t.{tensor.name}_group", "query": " + t.row_shift"}
    return [f"{index}{ways.get(str(axis), '')}" for axis, index in axes]


def bounded(reads: Reads, may: sympy.Basic, must: sympy.Basic) -> Reads:
    """With a variable for all extremes that `may` and `must` name. Several reads of a tensor at k are numbered."""
    found: dict[Place, str] = {}
    for read in _extremes_in(may, must):
        place, _ = _place(read)
        axes = "".join(symbol.name for symbol in (Q, K) if symbol in read.free_symbols)
        name = f"{reads.sources[place[0]].name}_{axes or 'all'}"
        if place not in found:
            taken = sum(other == name or other.startswith(f"{name}_") for other in found.values())
            found[place] = f"{name}_{taken + 1}" if taken else name
    return replace(reads, bounds=found)


def extremes(reads: Reads, may: sympy.Basic, must: sympy.Basic, text: Text) -> list[tuple[str, str]]:
    """(variables, call) pairs that set every extreme that `may` and `must` name, each once."""
    calls: dict[str, str] = {}
    for read in _extremes_in(may, must):
        place, _ = _place(read)
        name = reads.bounds[place]
        calls[f"{name}_low, {name}_high"] = _extreme_call(reads.sources[place[0]], read, text)
    return list(calls.items())


def _extremes_in(may: sympy.Basic, must: sympy.Basic) -> list[AppliedUndef]:
    reads = sorted(may.atoms(AppliedUndef) | must.atoms(AppliedUndef), key=str)
    return [read for read in reads if lookup_name(read).endswith((LOW, HIGH))]


def _place(read: AppliedUndef) -> tuple[Place, str]:
    """`doc.low(k)` -> (("doc", (k,)), "low")"""
    name, _, end = lookup_name(read).partition(".")
    return (name, read.args), end


def _extreme_call(source: Source, read: AppliedUndef, text: Text) -> str:
    name = source.name
    if isinstance(source, Choice):
        rows = f"(tiles.q_first // {source.rows} - t.{name}_first, tiles.q_last // {source.rows} - t.{name}_first)"
        units = f"(tiles.k_first // {source.unit}, tiles.k_last // {source.unit})"
        return f"rt.pooled(t.{name}, h // t.{name}_group, {rows}, {units})"
    moving = [index for index in read.args if index.free_symbols & {Q, K}]
    if not moving:
        return f"rt.bounds_of(t.{name})"
    if source.by_row and moving != [Q]:
        return f"rt.pair_extremes(tiles, lambda q, k: {_torch_read(source, read, text)})"
    place, indices = read.args.index(moving[0]), _indices(source, read, text)
    before, after = indices[:place], indices[place + 1 :]
    given = [f"t.{name}", "tiles", *before, *([f"after=({', '.join(after)},)"] if after else [])]
    given += ["shift=t.row_shift"] if source.by_row else []
    side = "row" if moving == [Q] else "key"
    return f"rt.{side}_extremes({', '.join(given)})"
