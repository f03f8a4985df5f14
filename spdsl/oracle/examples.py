"""Example values for what a pattern reads, so that its mask can be drawn without a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spdsl.ir.pattern import Choice, Pattern, Stream, Weight
from spdsl.ir.pattern import Tensor as TensorInput
from spdsl.ir.symbols import Boolean
from spdsl.oracle.call import Call
from spdsl.oracle.evaluate import Environment, evaluate
from spdsl.oracle.sizes import Sizes

_DOCUMENT_ENDS = (0.15, 0.45, 0.8)  # shares of the length: four documents of unequal length
_MARKED = (0.03, 0.22, 0.5, 0.71)  # places of marked tokens
_TILES = 3  # units per row tile of a given set
_ROWS = 64  # row tiles whose forced units are found at once
_DIM = 16  # head dim and hidden size where the pattern leaves them open
_SPREAD = 0.1  # standard deviation of weights


def example_inputs(
    pattern: Pattern, sizes: Sizes, *, choices: bool = False, weights: bool = True, forced_only: bool = False
) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors, given sets and weights of a pattern for one sequence, and a line about each.

    Selected sets are left to their scores; with `choices` lists stand in for them, the forced units and (unless
    `forced_only`) random ones.
    """
    inputs: dict[str, Tensor] = {}
    notes: list[str] = []
    for an_input in pattern.inputs:
        if isinstance(an_input, TensorInput):
            inputs[an_input.name], what = _tensor(an_input, sizes)
        elif isinstance(an_input, Choice) and an_input.given:
            inputs[an_input.name], what = _units(an_input, pattern.causal, sizes)
        elif isinstance(an_input, Choice) and an_input.selected and choices:
            inputs[an_input.name], what = _selected(pattern, an_input, inputs, sizes, forced_only)
        elif isinstance(an_input, Weight) and weights:
            inputs[an_input.name], what = _weight(pattern, an_input, sizes)
        else:
            continue
        notes.append(f"{an_input.name}: {what}")
    return inputs, notes


def _tensor(tensor: TensorInput, sizes: Sizes) -> tuple[Tensor, str]:
    """[1, *axes]: documents, marks or a ramp over tokens, alternation over heads; which pairs share a document."""
    known = {"head": sizes.heads, "kv_head": sizes.kv_heads, "query": sizes.rows, "token": sizes.keys}
    shape = [known[axis] if isinstance(axis, str) else axis for axis in tensor.axes]
    if not shape:
        return _scalar(tensor.dtype, sizes.keys)
    long_axis = next((i for i, axis in enumerate(tensor.axes) if axis in ("token", "query")), None)
    if long_axis is None:
        index: Tensor = sum((_along(i, shape) for i in range(len(shape))), torch.zeros((), dtype=torch.long))
        return _typed(index.expand(shape) % 2, tensor.dtype), "0 and 1 in turns"
    if tensor.by_row and "token" in tensor.axes and tensor.dtype != "float":
        return _pairs(tensor, shape), "four documents of unequal length"
    along = _along(long_axis, shape)
    if tensor.dtype == "int":
        ends = torch.tensor([int(share * shape[long_axis]) for share in _DOCUMENT_ENDS])
        return torch.bucketize(along, ends, right=True).expand(1, *shape), "four documents of unequal length"
    if tensor.dtype == "bool":
        marked = torch.tensor([int(share * shape[long_axis]) for share in _MARKED])
        return torch.isin(along, marked).expand(1, *shape), "four marked tokens"
    return (along / shape[long_axis]).double().expand(1, *shape), "a rise from 0 to 1"


def _pairs(tensor: TensorInput, shape: Sequence[int]) -> Tensor:
    """Of rows and tokens: whether they share a document, or how many documents later the row lies."""
    row, token = (_along(tensor.axes.index(axis), shape) for axis in ("query", "token"))
    ends = torch.tensor([int(share * int(token.numel())) for share in _DOCUMENT_ENDS])
    row, token = (torch.bucketize(x, ends, right=True).to(torch.int8) for x in (row, token))
    return (row == token if tensor.dtype == "bool" else row - token).expand(1, *shape)


def _along(axis: int, shape: Sequence[int]) -> Tensor:
    return torch.arange(shape[axis]).view([-1 if i == axis else 1 for i in range(len(shape))])


def _typed(x: Tensor, dtype: str) -> Tensor:
    """[*axes] with the batch in front."""
    return {"bool": x.bool(), "int": x.long()}.get(dtype, x.double()).unsqueeze(0)


def _scalar(dtype: str, length: int) -> tuple[Tensor, str]:
    if dtype == "int":
        return torch.tensor([length // 4]), str(length // 4)
    return (torch.tensor([True]), "true") if dtype == "bool" else (torch.tensor([0.5]).double(), "0.5")


def _units(choice: Choice, causal: bool, sizes: Sizes) -> tuple[Tensor, str]:
    """A few units of those that a tile of rows may see, [1, heads, row tiles, width]."""
    heads = {"head": sizes.heads, "group": sizes.kv_heads, "all": 1}[choice.share]
    tiles, units = -(-sizes.rows // choice.rows), -(-sizes.keys // choice.unit)
    width = min(choice.most or _TILES, _TILES, units)
    last = torch.arange(tiles).view(1, 1, -1, 1) * choice.rows + choice.rows - 1
    open_units = (last // choice.unit + 1).clamp(max=units) if causal else torch.full_like(last, units)
    shares = torch.rand(1, heads, tiles, width, generator=torch.Generator().manual_seed(0))
    return (shares * open_units).long(), f"{width} random units of {choice.unit} keys per tile of {choice.rows} queries"


def _weight(pattern: Pattern, weight: Weight, sizes: Sizes) -> tuple[Tensor, str]:
    """[*axes], normal, the same at every call."""
    stream = pattern.input(weight.stream)
    assert isinstance(stream, Stream)
    known = {
        "heads": stream.heads or sizes.kv_heads,
        "qk": stream.qk or pattern.qk_dim or _DIM,
        "v": stream.v or pattern.v_dim or _DIM,
        "hidden": _DIM,
    }
    shape = [known[axis] if isinstance(axis, str) else axis for axis in weight.axes]
    make = torch.Generator().manual_seed(sum(weight.name.encode()))
    return _SPREAD * torch.randn(shape, generator=make, dtype=torch.float64), f"normal, {_SPREAD} wide"


def _selected(
    pattern: Pattern, choice: Choice, inputs: dict[str, Tensor], sizes: Sizes, forced_only: bool
) -> tuple[Tensor, str]:
    """The forced units of each tile of rows and random ones up to the capacity, [1, heads, row tiles, n].

    All heads, and all rows of one unit, draw the same ranks, so that a picture shows units and no noise.
    """
    heads = sizes.heads if choice.share == "head" else sizes.kv_heads
    around = Call(pattern, inputs, sizes).around()
    least = 2 if forced_only else 0
    last = (sizes.first_tile(choice.rows) + 1 + torch.arange(sizes.tiles(choice.rows))) * choice.rows - 1
    units = sizes.units(choice.unit)
    width = min(choice.capacity or _TILES, units)
    drawn = torch.rand(int(last[-1]) // choice.unit + 1, units, generator=torch.Generator().manual_seed(0))
    ranked = []
    for rows in torch.split(last, _ROWS):
        forced, allowed = (_any(test, choice, around, rows) for test in (choice.force, choice.within))
        starts = torch.arange(forced.shape[1]) * choice.unit
        allowed = allowed & (starts <= rows.unsqueeze(1)) if pattern.causal else allowed
        # 2 for a forced unit, less than 1 for any other, -1 for what is no candidate.
        rank = drawn[rows // choice.unit].masked_fill(forced, 2).masked_fill(~allowed, -1)
        best = rank.sort(dim=1, descending=True, stable=True)
        ranked.append(best.indices[..., :width].masked_fill(best.values[..., :width] < least, -1))
    lists = torch.cat(ranked).expand(1, heads, -1, -1)
    return lists, f"forced units of {choice.unit} keys, and random ones where scores would choose; {width} at most"


def _any(test: Boolean, choice: Choice, around: Environment, rows: Tensor) -> Tensor:
    """Units any token of which passes for head 0: bool [rows, units]."""
    symbols = {**around.symbols, "q": rows.view(1, 1, -1, 1), "h": torch.zeros(1, 1, 1, 1, dtype=torch.long)}
    keys = around.symbols["k"].shape[3]
    passed = evaluate(test, Environment(symbols, around.tables, around.heads)).expand(1, 1, len(rows), keys)[0, 0]
    whole = torch.nn.functional.pad(passed, (0, -keys % choice.unit))
    return whole.view(len(rows), -1, choice.unit).any(2)
