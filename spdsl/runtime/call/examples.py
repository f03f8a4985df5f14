"""Example values for the arguments of a pattern: for reports, pictures and benchmarks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from spdsl.runtime.sequences import DTYPES, expect, expect_dtype, expect_number, expect_tensor


def example_tensor(
    axes: Sequence[str | int], kind: str, batch: int, sizes: Mapping[str, int], device: torch.device | str
) -> Tensor:
    """Over tokens: numbers rise in four steps (documents), flags are rare; over heads: numbers alternate.

    One of rows repeats them without memory of its own for each row.
    """
    shape = [sizes.get(str(axis), axis) for axis in axes]
    last = int(shape[-1]) if shape else 1
    along = torch.arange(last, device=device)
    token = bool(axes) and axes[-1] == "token"
    steps = along * 4 // max(last, 1) if token else along % 2
    values = {
        "int": steps,
        "bool": along % 61 == 0 if token else along % 2 == 1,
        "float": (along + 1.0) / max(last, 1),
    }[kind]
    if not axes:
        return values[0]
    wanted = [batch, *shape] if "token" in axes else shape
    found = values.expand(*(int(size) for size in wanted))
    return found if "query" in axes else found.contiguous()


def example_units(batch: int, heads: int, tokens: int, rows: int, unit: int, device: torch.device | str) -> Tensor:
    """Lists of four units: the first, the two before the own one, and the own one."""
    tile = torch.arange(-(-tokens // rows), device=device)
    own = ((tile + 1) * rows - 1).clamp(max=tokens - 1) // unit
    near = torch.stack([torch.zeros_like(own), own - 2, own - 1, own], 1).clamp(min=-1).int()
    return near.expand(batch, heads, -1, -1).contiguous()


def expect_gates(gates: Tensor, q: Tensor, branches: int) -> None:
    if isinstance(gates, Tensor):
        expect_tensor("gates", gates)
    wanted = [*q.shape[:3], branches]
    fits = isinstance(gates, Tensor) and list(gates.shape) == wanted
    expect(fits, "gates", "shape {}", getattr(gates, "shape", gates), wanted)
    expect(gates.dtype in DTYPES, "gates", "float16, bfloat16, float32 or float64", gates.dtype)
    expect(gates.device == q.device, "gates", f"device {q.device}", gates.device)


def check_example(batch: int, tokens: int, dtype: torch.dtype, **sizes: int) -> None:
    """The arguments of `example_inputs`."""
    expect_number("batch", batch, "a number >= 0")
    expect_number("tokens", tokens, "a number >= 0")
    for name, size in sizes.items():
        expect_number(name, size, "a number >= 1", 1)
    expect_dtype(dtype)


def example_weight(*sizes: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A learned tensor whose products keep the size of what they multiply."""
    reduced = sizes[1:-1] if len(sizes) > 2 else sizes[1:]
    scale: float = max(1, math.prod(reduced)) ** -0.5
    return (torch.randn(sizes, device=device, dtype=torch.float32) * scale).to(dtype)
