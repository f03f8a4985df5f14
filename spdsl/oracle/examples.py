"""Example values for what a pattern reads, so that its mask can be drawn without a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spdsl.ir.pattern import Choice, Pattern
from spdsl.ir.pattern import Tensor as TensorInput
from spdsl.oracle.dense import Sizes

_DOCUMENT_ENDS = (0.15, 0.45, 0.8)  # shares of the length: four documents of unequal length
_MARKED = (0.03, 0.22, 0.5, 0.71)  # places of marked tokens
_TILES = 3  # units per row tile of a given set


def example_inputs(pattern: Pattern, sizes: Sizes) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors and given sets of a pattern for one sequence, and a line about each."""
    inputs: dict[str, Tensor] = {}
    notes: list[str] = []
    for found in pattern.inputs:
        if isinstance(found, TensorInput):
            inputs[found.name], what = _tensor(found, sizes)
        elif isinstance(found, Choice) and found.rule == "given":
            inputs[found.name], what = _units(found, pattern.causal, sizes)
        else:
            continue
        notes.append(f"{found.name}: {what}")
    return inputs, notes


def _tensor(tensor: TensorInput, sizes: Sizes) -> tuple[Tensor, str]:
    """[1, *axes]: documents, marks or a ramp over tokens, alternation over heads."""
    known = {"head": sizes.heads, "kv_head": sizes.kv_heads, "query": sizes.rows, "token": sizes.keys}
    shape = [known[axis] if isinstance(axis, str) else axis for axis in tensor.axes]
    if not shape:
        return _scalar(tensor.dtype, sizes.keys)
    long_axis = next((i for i, axis in enumerate(tensor.axes) if axis in ("token", "query")), None)
    if long_axis is None:
        index: Tensor = sum((_along(i, shape) for i in range(len(shape))), torch.zeros((), dtype=torch.long))
        return _typed(index.expand(shape) % 2, tensor.dtype), "0 and 1 in turns"
    along = _along(long_axis, shape)
    if tensor.dtype == "int":
        ends = torch.tensor([int(share * shape[long_axis]) for share in _DOCUMENT_ENDS])
        return torch.bucketize(along, ends, right=True).expand(1, *shape), "four documents of unequal length"
    if tensor.dtype == "bool":
        marked = torch.tensor([int(share * shape[long_axis]) for share in _MARKED])
        return torch.isin(along, marked).expand(1, *shape), "four marked tokens"
    return (along / shape[long_axis]).double().expand(1, *shape), "a rise from 0 to 1"


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
    heads = sizes.heads if choice.share == "head" else sizes.kv_heads
    tiles, units = -(-sizes.rows // choice.rows), -(-sizes.keys // choice.unit)
    width = min(choice.most or _TILES, _TILES, units)
    last = torch.arange(tiles).view(1, 1, -1, 1) * choice.rows + choice.rows - 1
    open_units = (last // choice.unit + 1).clamp(max=units) if causal else torch.full_like(last, units)
    shares = torch.rand(1, heads, tiles, width, generator=torch.Generator().manual_seed(0))
    return (shares * open_units).long(), f"{width} random units of {choice.unit} keys per tile of {choice.rows} queries"
