"""Patterns with compressed streams and selected sets, built by hand, and numbers for their arguments."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor

from spdsl.ir.pattern import (
    ALL_PHASES,
    Case,
    Choice,
    Compress,
    Gate,
    Grid,
    Input,
    Mass,
    Pattern,
    Query,
    Score,
    Softmax,
    Stream,
    Term,
    Values,
    Weight,
)  # fmt: skip
from spdsl.ir.rule import Size, TopK
from spdsl.ir.symbols import H, K, Q, membership

CAUSAL = K <= Q
Inputs = dict[str, Tensor]

ROLES: dict[str, dict[str, tuple[str | int, ...]]] = {
    "weighted": {"weight": ("heads", "width"), "position": ("heads", "width", "dim")},
    "mlp": {
        "position": ("heads", "width", "dim"),
        "up": ("heads", "width", "dim", "hidden"),
        "down": ("heads", "hidden", "dim"),
    },
}


def pattern(inputs: tuple[Input, ...], *results: Any, causal: bool = True) -> Pattern:
    case = Case(ALL_PHASES, None, results[0], results[1:])
    return Pattern("p", "", None, None, None, None, (), causal, inputs, (case,))


def entries(width: int, stride: int, by: str, source: str = "kv", **more: Any) -> Stream:
    made = Compress(source, by, more.pop("logits", None))
    return Stream("entries", grid=Grid(width, stride), compress=made, **more)


def weights(width: int, by: str) -> tuple[Weight, ...]:
    """The weights of the stream `entries`."""
    return tuple(
        Weight(
            f"entries_{side}_{role}",
            "entries",
            tuple(width if axis == "width" else dim if axis == "dim" else axis for axis in axes),
        )
        for side, dim in (("k", "qk"), ("v", "v"))
        for role, axes in ROLES.get(by, {}).items()
    )


def closed(width: int, stride: int) -> sympy.Basic:
    return stride * K + width - 1 <= Q


def coarse(width: int, stride: int, *, causal: bool = True) -> Softmax:
    return Softmax("coarse", "q", (Term("entries", closed(width, stride) if causal else sympy.true),))


def member(choice: Choice) -> sympy.Basic:
    tile, unit = sympy.floor(Q / sympy.Integer(choice.rows)), sympy.floor(K / sympy.Integer(choice.unit))
    return sympy.Ne(membership(choice.name, H, tile, unit), 0)


def first(n: int, unit: int) -> sympy.Basic:
    return n * unit > K


def last(n: int, unit: int) -> sympy.Basic:
    own = sympy.floor(Q / sympy.Integer(unit))
    return sympy.And(unit * (own - n + 1) <= K, unit * (own + 1) > K)


def top_k(count: int, score: Score, unit: int, **how: Any) -> Choice:
    defaults = {"share": "group", "heads_by": "sum", "unit_by": "sum"}
    return Choice("chosen", TopK(Size.of(count)), unit, score=score, **{"rows": 1, **defaults, **how})


def nsa(
    width: int = 8, stride: int = 4, unit: int = 16, count: int = 4, window: int = 10, by: str = "mlp", **how: Any
) -> Pattern:
    """Native Sparse Attention (arXiv 2502.11089) in small, a stream for each branch."""
    streams = tuple(Stream(name) for name in ("rough", "picked", "recent"))
    derived = entries(width, stride, by, "rough")
    rough = coarse(width, stride)
    force = {"force": first(1, unit) | last(2, unit)}
    chosen = top_k(count, Mass(rough), unit, **{**force, **how})
    fine = Softmax("fine", "q", (Term("picked", sympy.And(member(chosen), CAUSAL)),))
    near = Softmax("near", "q", (Term("recent", sympy.And(Q - K < window, CAUSAL)),))
    inputs = (Query("q"), *streams, derived, *weights(width, by), chosen)
    return pattern(inputs, Gate((rough, fine, near)))


def selected(
    chosen: Choice, *more: Any, width: int, stride: int, by: str = "mean", value: Values = Values.OWN
) -> Pattern:
    """One softmax over the chosen units of `kv`, scored by entries of `kv`."""
    fine = Softmax("fine", "q", (Term("kv", sympy.And(member(chosen), CAUSAL)),))
    return pattern((Query("q"), Stream("kv"), entries(width, stride, by), *weights(width, by), chosen), fine, *more)


def numbers(
    found: Pattern,
    rows: int,
    keys: int | None = None,
    *,
    heads: int = 2,
    kv_heads: int = 1,
    dim: int = 4,
    batch: int = 1,
) -> Inputs:
    """Random arguments in float64."""
    make, keys = torch.Generator().manual_seed(rows), keys or rows

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=make, dtype=torch.float64)

    inputs: Inputs = {}
    sizes = {"heads": kv_heads, "qk": dim, "v": dim, "hidden": 3}
    for one in found.inputs:
        if isinstance(one, Query):
            inputs[one.name] = normal(batch, one.heads or heads, rows, dim)
        elif isinstance(one, Stream) and one.compress is None:
            inputs[one.key_argument] = normal(batch, one.heads or kv_heads, keys, dim)
            if one.value_argument:
                inputs[one.value_argument] = normal(batch, one.heads or kv_heads, keys, dim)
        elif isinstance(one, Weight):
            inputs[one.name] = normal(*(sizes[axis] if isinstance(axis, str) else axis for axis in one.axes))
    branches = [len(case.branch.branches) for case in found.cases if isinstance(case.branch, Gate)]
    return inputs | ({"gates": normal(batch, heads, rows, branches[0])} if branches else {})
