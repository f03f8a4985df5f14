"""The scale that a call gives: it stands for 1 / sqrt(dim) wherever the pattern writes none.

A number passes through an operator as it is, and a kernel gets it as an argument, so no value is compiled anew. Only
torch.compile makes a graph for each number, unless it is in a tensor: where it takes a float for unknown, because it
has seen another one, the scale becomes a tensor of the host, which can be read without waiting for a device.
"""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

# Far inside of float32, in which kernels multiply it by scores: below about 1e-38 it would be 0 there.
LEAST, MOST = 1e-30, 1e30


def scale_of_call(scale: object) -> tuple[float | None, Tensor | None]:
    """-> the number; or where it is not known while PyTorch traces, a tensor of it. Raises TypeError, ValueError."""
    if scale is None:
        return None, None
    if isinstance(scale, bool) or not isinstance(scale, Real | torch.SymFloat):
        raise TypeError(f"scale: expected a number, got {type(scale).__name__}")
    number: Any = scale
    if torch.compiler.is_compiling() and not _in_the_graph(number):
        return None, torch.ones((), dtype=torch.float64) * number
    return expect_scale(float(number)), None


def expect_scale(scale: float) -> float:
    if not LEAST <= scale <= MOST:  # nor is NaN
        raise ValueError(f"scale: expected a number from {LEAST} to {MOST}, got {scale}")
    return scale


def refuse_scale(scale: object) -> None:
    """Of a pattern that writes the scale of every product."""
    if scale is not None:
        raise ValueError(f"scale: expected None, as the pattern writes that of each attend and dot, got {scale}")


def _in_the_graph(scale: float) -> bool:
    """Whether a graph is made for this number alone."""
    from torch.fx.experimental.symbolic_shapes import has_static_value  # loads sympy: not before one compiles

    return has_static_value(scale)
