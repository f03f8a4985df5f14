"""reads: how a tensor read of an element test is written, and which arguments carry the tensor.

In kernels a read goes through `t`, a tuple of pointers and strides; in torch text through `t`, a tuple of tensors.
Names: `t.doc` the data, `t.doc_0` the stride of its first axis, `t.tiles_first` the first row tile of a list. A token
axis is read below `length` alone: behind the last token of a sequence lie those of the next, or nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import sympy
from sympy.core.function import AppliedUndef

from spdsl.ir.interval import HIGH, LOW
from spdsl.ir.pattern import Choice, Tensor
from spdsl.ir.symbols import K, Q, lookup_name

Text = Callable[[sympy.Basic], str]
Source = Tensor | Choice


@dataclass(frozen=True, slots=True)
class Reads:
    """Prints the reads of one softmax. `sources` by the names in tests, each as the text writes it."""

    sources: Mapping[str, Source]

    def triton(self, read: AppliedUndef, text: Text) -> str:
        source = self.sources[lookup_name(read)]
        if isinstance(source, Choice):
            return self._choice(source, read, text)
        pointer, there = self.pointer(read, text)
        mask = f", mask={there}, other=0" if there else ""
        return f"tl.load({pointer}{mask})"

    def pointer(self, read: AppliedUndef, text: Text) -> tuple[str, str]:
        """Where an element lies for a kernel, and whether there is one; "" where it is certain."""
        source = self.sources[lookup_name(read)]
        assert isinstance(source, Tensor)
        name = source.name
        offsets, bounds = [f"t.{name}"], []
        for i, (axis, index) in enumerate(zip(source.axes, read.args, strict=True)):
            printed = text(index)
            if axis == "token":
                offsets.append(f"tl.cast({printed}, tl.int64) * t.{name}_{i}")
                bounds.append(f"({printed} >= 0) & ({printed} < length)")
            elif axis == "kv_head":
                offsets.append(f"tl.cast({printed} // t.{name}_group, tl.int64) * t.{name}_{i}")
            else:
                offsets.append(f"tl.cast({printed}, tl.int64) * t.{name}_{i}")
                bounds += _bounds(axis, index, printed)
        return " + ".join(offsets), " & ".join(bounds)

    def _choice(self, choice: Choice, read: AppliedUndef, text: Text) -> str:
        name = choice.name
        head, tile, _ = (text(index) for index in read.args)
        place = f"{head} // t.{name}_group, {tile} - t.{name}_first, {text(K)}, {choice.unit}"
        return f"rt.member(t.{name}, {place}, t.{name}_tiles, t.{name}_units)"

    def torch(self, read: AppliedUndef, text: Text) -> str:
        if lookup_name(read).endswith((LOW, HIGH)):
            return extreme_variable(read, self.sources)
        source = self.sources[lookup_name(read)]
        name = source.name
        if isinstance(source, Choice):
            head, tile, unit = (text(index) for index in read.args)
            return f"rt.read(t.{name}, {head} // t.{name}_group, {tile} - t.{name}_first, {unit})"
        return f"rt.read(t.{', '.join([name, *_indices(source, read, text)])})"

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


def _bounds(axis: str | int, index: sympy.Basic, printed: str) -> list[str]:
    """Of an axis of a declared size, but where the index is a number or a remainder that certainly lies in it."""
    if not isinstance(axis, int) or index.is_number:
        return []
    if isinstance(index, sympy.Mod) and index.args[1].is_number and index.args[1] <= axis:
        return []
    return [f"({printed} >= 0) & ({printed} < {axis})"]


def _indices(tensor: Tensor, read: AppliedUndef, text: Text) -> list[str]:
    """One for each axis, in torch text."""
    axes = zip(tensor.axes, map(text, read.args), strict=True)
    return [f"{index} // t.{tensor.name}_group" if axis == "kv_head" else index for axis, index in axes]


def extreme_variable(read: AppliedUndef, sources: Mapping[str, Source]) -> str:
    """`doc.low(k)` is the variable doc_k_low that `extremes` has set."""
    name, _, end = lookup_name(read).partition(".")
    axes = "".join(symbol.name for symbol in (Q, K) if symbol in read.free_symbols)
    return f"{sources[name].name}_{axes or 'all'}_{end}"


def extremes(may: sympy.Basic, must: sympy.Basic, sources: Mapping[str, Source], text: Text) -> list[tuple[str, str]]:
    """(variables, call) pairs that set every extreme that `may` and `must` name, each once."""
    reads = sorted(may.atoms(AppliedUndef) | must.atoms(AppliedUndef), key=str)
    calls: dict[str, str] = {}
    for read in reads:
        name, _, end = lookup_name(read).partition(".")
        if end:
            low = extreme_variable(read, sources).rsplit("_", 1)[0]
            calls[f"{low}_low, {low}_high"] = _extreme_call(sources[name], read, text)
    return list(calls.items())


def _extreme_call(source: Source, read: AppliedUndef, text: Text) -> str:
    name = source.name
    if isinstance(source, Choice):
        rows = f"(tiles.q_first // {source.rows} - t.{name}_first, tiles.q_last // {source.rows} - t.{name}_first)"
        units = f"(tiles.k_first // {source.unit}, tiles.k_last // {source.unit})"
        return f"rt.pooled(t.{name}, h // t.{name}_group, {rows}, {units})"
    moving = [index for index in read.args if index.free_symbols & {Q, K}]
    if not moving:
        return f"rt.bounds_of(t.{name})"
    place, indices = read.args.index(moving[0]), _indices(source, read, text)
    before, after = indices[:place], indices[place + 1 :]
    given = [f"t.{name}", "tiles", *before, *([f"after=({', '.join(after)},)"] if after else [])]
    side = "row" if moving == [Q] else "key"
    return f"rt.{side}_extremes({', '.join(given)})"
