"""Inputs of every pattern, and one comparison.

`checked` runs a generated module and the float64 oracle on the same numbers and compares every result and gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from spdsl.ir.pattern import Choice, Gate, Pattern, Query, Stream, Weight
from spdsl.ir.pattern import Tensor as TensorInput
from spdsl.ir.symbols import lookup_name, lookups
from spdsl.oracle import dense
from tests.numerics.patterns import module_of, pattern_of

Inputs = dict[str, Tensor]
Part = tuple[Tensor, Tensor]
Result = Part | Tensor  # a branch; a score or a divergence


@dataclass(frozen=True)
class Shape:
    rows: int = 50
    keys: int = 50
    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    qk: int = 16
    v: int = 16
    offsets: tuple[int, int] | None = None  # q_offset, k_offset
    seed: int = 0

    @property
    def origins(self) -> tuple[int, int]:
        return self.offsets or (self.keys - self.rows, 0)

    @property
    def tokens(self) -> int:
        """Entries of a token axis: all positions of the whole sequence, as far as it is known."""
        return max(self.origins[0] + self.rows, self.origins[1] + self.keys) if self.offsets else self.keys

    def call(self) -> dict[str, int]:
        return {} if self.offsets is None else {"q_offset": self.offsets[0], "k_offset": self.offsets[1]}


def inputs_of(pattern: Pattern, shape: Shape, dtype: torch.dtype = torch.float64) -> Inputs:
    """Random arguments of `attention`."""
    make = torch.Generator().manual_seed(shape.seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=make, dtype=torch.float64).to(dtype)

    inputs: Inputs = {}
    for found in pattern.inputs:
        if isinstance(found, Query):
            if found.source is not None:
                continue
            inputs[found.name] = normal(shape.batch, found.heads or shape.heads, shape.rows, found.dim or shape.qk)
        elif isinstance(found, Stream):
            if found.compress is not None:
                continue
            heads = found.heads or shape.kv_heads
            inputs[found.key_argument] = normal(shape.batch, heads, shape.keys, found.qk or shape.qk)
            if found.value_argument:
                inputs[found.value_argument] = normal(shape.batch, heads, shape.keys, found.v or shape.v)
        elif isinstance(found, Weight):
            known = {"heads": shape.kv_heads, "qk": shape.qk, "v": shape.v, "hidden": 5}
            size = [known[axis] if isinstance(axis, str) else axis for axis in found.axes]
            inputs[found.name] = normal(*size) / (size[1] ** 0.5 if len(size) > 1 else 1)
        elif isinstance(found, TensorInput):
            inputs[found.name] = _tensor(found, shape, make, dtype)
        elif found.given:
            inputs[found.name] = _units(found, shape, make)
    gates = [len(case.branch.branches) for case in pattern.cases if isinstance(case.branch, Gate)]
    if gates:
        inputs["gates"] = normal(shape.batch, shape.heads, shape.rows, gates[0])
    return inputs


def _tensor(tensor: TensorInput, shape: Shape, make: torch.Generator, dtype: torch.dtype) -> Tensor:
    known = {"head": shape.heads, "kv_head": shape.kv_heads, "token": shape.tokens, "query": shape.rows}
    size = [known[axis] if isinstance(axis, str) else axis for axis in tensor.axes]
    if "token" in tensor.axes or tensor.by_row or not tensor.axes:
        size = [shape.batch, *size]
    if tensor.dtype == "bool":
        return torch.rand(size, generator=make) < (0.1 if "token" in tensor.axes else 0.5)
    if tensor.dtype == "int":
        if "token" not in tensor.axes:
            return torch.randint(0, 40, size, generator=make)
        return torch.rand(size, generator=make).lt(0.06).long().cumsum(-1)
    # Multiples of 1/256 are exact in every dtype: a cache keeps token numbers in fp32.
    return (torch.rand(size, generator=make, dtype=torch.float64) * 256).round().div(256).to(dtype)


def _units(choice: Choice, shape: Shape, make: torch.Generator) -> Tensor:
    """Lists in any order, with repeats, padding in the middle, and an empty one."""
    origin, _ = shape.origins
    tiles = (origin + shape.rows - 1) // choice.rows - origin // choice.rows + 1
    most = -(-shape.tokens // choice.unit)
    heads = {"head": shape.heads, "group": shape.kv_heads, "all": 1}[choice.share]
    units = torch.randint(-1, most, (shape.batch, heads, tiles, 9 if choice.listed else 4), generator=make)
    units[:, :, -1:, 0] = max(0, most - 2)
    if tiles > 2:
        units[:, :, 1] = -1
    return units


def guarded(x: Tensor) -> Tensor:
    """The same numbers as a slice of storage whose other elements are NaN (for integers: absurd)."""
    if not x.dim():
        return x
    fill: Any = torch.nan if x.is_floating_point() else True if x.dtype == torch.bool else 10**6
    sides = 3 if x.dim() == 4 and x.is_floating_point() else 0
    storage = x.new_full((*x.shape[:-2], *(size + 6 * bool(sides) for size in x.shape[-2:])), fill)
    inner = storage[..., sides : sides + x.shape[-2], sides : sides + x.shape[-1]] if sides else storage
    return inner.copy_(x)


def differentiable(pattern: Pattern, inputs: Inputs) -> list[str]:
    """Vectors, gates, sinks, weights and what biases read get gradients."""
    learned = {softmax.sink for softmax in pattern.softmaxes()}
    read = {
        lookup_name(x) for softmax in pattern.softmaxes() if softmax.bias is not None for x in lookups(softmax.bias)
    }
    learned |= {name for name in read if inputs[name].is_floating_point()}
    learned |= {found.name for found in pattern.inputs if isinstance(found, Weight)}
    read = {found.name for found in pattern.inputs if isinstance(found, TensorInput)}
    vectors = [name for name, x in inputs.items() if name not in read and x.dim() == 4 and x.is_floating_point()]
    return [name for name in inputs if name in learned or name in vectors]


@dataclass
class Found:
    """Results (out, lse) and gradients by name."""

    parts: list[Any]
    grads: Inputs = field(default_factory=dict)


Run = Callable[[Inputs], Sequence[Result]]


def evaluated(run: Run, pattern: Pattern, inputs: Inputs, *, lse_gradient: bool = True, backward: bool = True) -> Found:
    """Runs and differentiates a fixed random combination of all outputs (and of the finite lse)."""
    names = differentiable(pattern, inputs) if backward else []
    given = {name: x.detach().requires_grad_(name in names) for name, x in inputs.items()}
    parts = list(run(given))
    if not names:
        return Found(parts)
    make = torch.Generator().manual_seed(99)
    total = torch.zeros((), dtype=torch.float64)
    for part in parts:
        out, lse = part if isinstance(part, tuple) else (part.new_zeros(0), part)
        weights = torch.randn(out.shape, generator=make, dtype=torch.float64)
        of_lse = torch.randn(lse.shape, generator=make, dtype=torch.float64)
        total = total + (out * weights.to(out.dtype)).sum(dtype=torch.float64)
        if lse_gradient or isinstance(part, Tensor):
            total = total + (lse.masked_fill(lse == -torch.inf, 0.0) * of_lse.to(lse.dtype)).sum(dtype=torch.float64)
    found = torch.autograd.grad(total, [given[name] for name in names], allow_unused=True)
    grads = {name: torch.zeros_like(given[name]) if x is None else x for name, x in zip(names, found, strict=True)}
    return Found(
        [tuple(x.detach() for x in part) if isinstance(part, tuple) else part.detach() for part in parts], grads
    )


def parts_of(answer: Any) -> list[Any]:
    """What `attention(..., return_lse=True)` returned, as a list of results."""
    return [answer] if isinstance(answer[0], Tensor) else list(answer)


def generated(
    module: ModuleType, pattern: Pattern, inputs: Inputs, /, call: dict[str, Any] | None = None, **how: bool
) -> Found:
    return evaluated(lambda x: parts_of(module.attention(**x, **(call or {}), return_lse=True)), pattern, inputs, **how)


def meant(pattern: Pattern, inputs: Inputs, call: dict[str, int] | None = None, **how: bool) -> Found:
    return evaluated(lambda x: dense.results(pattern, x, **(call or {})), pattern, inputs, **how)


def assert_same(found: Found, wanted: Found, bound: float = 1e-10) -> None:
    """Every result and gradient within `bound`; never NaN; -inf exactly where it is meant."""
    assert len(found.parts) == len(wanted.parts)
    for part, wanted_part in zip(found.parts, wanted.parts, strict=True):
        if isinstance(wanted_part, Tensor):
            torch.testing.assert_close(part.double(), wanted_part.double(), rtol=bound, atol=bound)
            continue
        (out, lse), (wanted_out, wanted_lse) = part, wanted_part
        torch.testing.assert_close(lse.double(), wanted_lse.double(), rtol=bound, atol=bound, msg=lambda m: f"lse: {m}")
        torch.testing.assert_close(out.double(), wanted_out.double(), rtol=bound, atol=bound, msg=lambda m: f"out: {m}")
    assert found.grads.keys() == wanted.grads.keys()
    for name, grad in wanted.grads.items():
        torch.testing.assert_close(
            found.grads[name].double(), grad.double(), rtol=bound, atol=bound, msg=lambda m, name=name: f"d{name}: {m}"
        )


def checked(name: str, shape: Shape, *, module: ModuleType | None = None, **how: bool) -> Found:
    """A generated module in fp64 against the oracle, its inputs amid NaN."""
    pattern, module = pattern_of(name), module or module_of(name)
    inputs = {key: guarded(x) for key, x in inputs_of(pattern, shape).items()}
    found = generated(module, pattern, inputs, shape.call(), **how)
    assert_same(found, meant(pattern, inputs, shape.call(), **how))
    return found


def cut(pattern: Pattern, inputs: Inputs, first: int, end: int) -> Inputs:
    """The inputs of tokens first..end - 1: all but tensors of neither tokens nor rows, given lists and weights is cut.

    Beside rows a token axis counts from the first token of the sequence, and stays.
    """
    tensors = [found for found in pattern.inputs if isinstance(found, TensorInput)]
    axes = {found: "query" if found.by_row else "token" for found in tensors if found.by_row or found.by_token}
    along = {found.name: found.axes.index(axis) - len(found.axes) for found, axis in axes.items()}
    lists = {found.name for found in pattern.inputs if isinstance(found, Choice) and found.listed}
    whole = {found.name for found in pattern.inputs if isinstance(found, TensorInput | Choice | Weight)}
    whole -= along.keys() | lists
    return {
        name: x if name in whole else x.narrow(along.get(name, 2), first, end - first) for name, x in inputs.items()
    }


def joined(found: Sequence[Sequence[Any]]) -> list[Any]:
    """Results of consecutive tokens as results of all of them."""
    return [
        torch.cat(parts, 2)
        if isinstance(parts[0], Tensor)
        else (torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2))
        for parts in zip(*found, strict=True)
    ]


def separate(pattern: Pattern, inputs: Inputs, bounds: Sequence[tuple[int, int]], **how: bool) -> Found:
    """The meaning of packed sequences: every [first, end) by itself, the gradients from one sum over all."""
    return evaluated(
        lambda x: joined([dense.results(pattern, cut(pattern, x, *span)) for span in bounds if span[0] < span[1]]),
        pattern,
        inputs,
        **how,
    )


def cached(
    module: ModuleType, pattern: Pattern, inputs: Inputs, chunks: Sequence[int], decoded: int, cache: Any
) -> list[Any]:
    """Prefill by chunks of tokens, then decode token by token, behind what the cache holds."""
    answers, first = [], 0
    for size in (*chunks, *[1] * decoded):
        step = module.decode if len(answers) >= len(chunks) else module.prefill
        part = {name: x.contiguous() for name, x in cut(pattern, inputs, first, first + size).items()}
        answers.append(parts_of(step(**part, cache=cache, return_lse=True)))
        first += size
    return joined(answers)


def nan_cache(module: ModuleType, shape: Shape, capacity: int, page: int | None, **how: Any) -> Any:
    """A cache whose free memory is NaN; pages lie in random order."""
    table = None
    if page is not None:
        width = -(-capacity // page)
        order = torch.randperm(shape.batch * width + 3, generator=torch.Generator().manual_seed(shape.seed))
        table = order[: shape.batch * width].int().view(shape.batch, width)
    cache = module.Cache(
        shape.batch, capacity, kv_heads=shape.kv_heads, qk_dim=shape.qk, v_dim=shape.v, page=page, page_table=table,
        **{"dtype": torch.float64, **how},
    )  # fmt: skip
    for store in (*cache.k.values(), *cache.v.values()):
        store.fill_(torch.nan)
    return cache
