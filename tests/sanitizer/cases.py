"""One small call of each kind. Sizes are no multiples of a tile, inputs are slices of larger memory, and what lies
beside them, tokens in no sequence and free room of a cache count as never written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from spdsl.ir.pattern import Choice, Pattern, Weight
from spdsl.ir.pattern import Tensor as TensorInput
from tests.numerics.cases import Inputs, Shape, cut, generated, guarded, inputs_of, nan_cache, parts_of
from tests.sanitizer.poison import poison, unwritten

Case = Callable[[ModuleType, Pattern], None]


def _shape(pattern: Pattern, rows: int, keys: int | None = None, batch: int = 1, **more: Any) -> Shape:
    heads, kv_heads = pattern.query_heads or 2, pattern.kv_heads or 1
    return Shape(rows, rows if keys is None else keys, batch, heads, kv_heads, qk=24, v=16, **more)


def _expect_written(found: Iterable[Any]) -> None:
    """Results (and parts of results) hold nothing that was never written."""
    for x in found:
        if isinstance(x, Tensor):
            assert not unwritten(x).any(), f"{int(unwritten(x).sum())} elements of a result were never written"
        elif x is not None:
            _expect_written(x)


def _trained(module: ModuleType, pattern: Pattern, inputs: Inputs, **call: Any) -> None:
    found = generated(module, pattern, {name: guarded(x) for name, x in inputs.items()}, call)
    _expect_written([found.parts, found.grads.values()])


def train(module: ModuleType, pattern: Pattern) -> None:
    """Forward and backward, the gradient of the log-sum-exp included."""
    _trained(module, pattern, inputs_of(pattern, _shape(pattern, 37)))


def part(module: ModuleType, pattern: Pattern) -> None:
    """Rows and keys of a longer sequence, the keys from its middle on."""
    shape = _shape(pattern, 18, 33, offsets=(30, 10))
    _trained(module, pattern, inputs_of(pattern, shape), **shape.call())


def packed(module: ModuleType, pattern: Pattern) -> None:
    """One sequence is empty, one has a token, and three tokens are in none."""
    inputs = inputs_of(pattern, _shape(pattern, 40))
    for name in _of_tokens(pattern, inputs):
        poison(inputs[name][:, :, 37:])
    for name, axis in _of_rows(pattern):
        poison(inputs[name].narrow(axis, 37, 3))
    _trained(module, pattern, inputs, cu_seqlens=torch.tensor([0, 19, 19, 20, 37], dtype=torch.int32))


def padded(module: ModuleType, pattern: Pattern) -> None:
    inputs, lengths = inputs_of(pattern, _shape(pattern, 21, batch=3)), [21, 0, 18]
    for name in _of_tokens(pattern, inputs):
        for x, length in zip(inputs[name], lengths, strict=True):
            poison(x[:, : 21 - length])
    for name, axis in _of_rows(pattern):
        for x, length in zip(inputs[name], lengths, strict=True):
            poison(x.narrow(axis - 1, 0, 21 - length))
    _trained(module, pattern, inputs, lengths=torch.tensor(lengths))


def _cached(module: ModuleType, pattern: Pattern, page: int | None) -> None:
    whole = _shape(pattern, 44, batch=2)
    cache = nan_cache(module, whole, 52, page)
    for store in (*cache.k.values(), *cache.v.values(), *cache.tokens.values()):
        poison(store)
    if page is not None:
        cache.page_table[1, 2:] = -1
    inputs, first = inputs_of(pattern, whole), 0
    for size, step in ((23, module.prefill), (19, module.prefill), (1, module.decode), (1, module.decode)):
        given = {name: guarded(x) for name, x in cut(pattern, inputs, first, first + size).items()}
        given |= _lists(pattern, _shape(pattern, size, first + size, 2))
        _expect_written(parts_of(step(**given, cache=cache, return_lse=True)))
        first += size
        if first == 23:
            cache.reset([1])
    assert cache.lengths.tolist() == [44, 21]


def cached(module: ModuleType, pattern: Pattern) -> None:
    """Prefill in two chunks, between which one sequence starts anew, and two steps."""
    _cached(module, pattern, None)


def paged(module: ModuleType, pattern: Pattern) -> None:
    """The same in pages that lie in any order; one sequence has as few as it needs."""
    _cached(module, pattern, 16)


def _of_tokens(pattern: Pattern, inputs: Inputs) -> list[str]:
    """Queries, keys and values. Gates are applied to every row as they are."""
    others = {"gates"} | {found.name for found in pattern.inputs if isinstance(found, TensorInput | Weight)}
    return [name for name, x in inputs.items() if x.dim() == 4 and x.is_floating_point() and name not in others]


def _of_rows(pattern: Pattern) -> list[tuple[str, int]]:
    """Tensors with a number for each query, and the axis of these, behind the batch."""
    found = (x for x in pattern.inputs if isinstance(x, TensorInput) and x.by_row)
    return [(x.name, x.axes.index("query") + 1) for x in found]


def _lists(pattern: Pattern, shape: Shape) -> Inputs:
    """Given lists of units: they count from the tile of the call's first row."""
    given = [found.name for found in pattern.inputs if isinstance(found, Choice) and found.given]
    return {name: x for name, x in inputs_of(pattern, shape).items() if name in given}
