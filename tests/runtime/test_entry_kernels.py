"""The kernels of compressed streams against the torch functions, and compiled for every target."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spdsl import targets
from spdsl.machine.crosscompile import compile_launch
from spdsl.machine.launches import Launch, specialise
from spdsl.runtime.call.layouts import Options, layout_of
from spdsl.runtime.entries import entry_launch
from spdsl.runtime.entries.entries import (
    Cells,
    cells_of,
    compress,
)
from spdsl.runtime.entries.entry_kernels import entries_backward, entries_forward
from spdsl.runtime.pools.table import POOLS
from spdsl.runtime.sequences import Layout
from tests.runtime.entry_cases import (
    DIM,
    HEADS,
    LAYOUTS,
    STREAMED,
    case_of,
    dense,
    pool_of,
    weights_of,
)

pytestmark = pytest.mark.usefixtures("poisoned")
CELLS = [Cells(8, 4), Cells(3, 5), Cells(5, 3, before=4), Cells(8, 4, before=4, partial=True)]


class Streamed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cells: Cells, layout: Layout, by: str, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        ctx.call = (cells, layout, by)
        return entries_forward(x, cells, layout, by, *weights)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        x, *weights = ctx.saved_tensors
        dx, *grads = entries_backward(dout, x, *ctx.call, *weights)
        return dx, None, None, None, *grads


def both(
    x: Tensor, layout: Layout, cells: Cells, kind: str, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Entries and all gradients, of the kernels in `dtype` and of torch in float64."""
    weights = weights_of(kind, cells.width, dtype, x.shape[3])
    inputs = [y.detach().to(dtype).requires_grad_() for y in (x, *weights.values())]
    exact = [y.detach().double().requires_grad_() for y in inputs]
    found = Streamed.apply(inputs[0], cells, layout, kind, *inputs[1:])
    named = dict(zip(weights, exact[1:], strict=True))
    wanted = compress(exact[0], cells, layout, pool_of(kind, named, lambda: exact[0]))
    torch.manual_seed(2)
    dout = torch.randn_like(wanted).to(dtype)
    # What is not there must not be read; a cell of zeros is an entry all the same.
    if layout.k_spans is not None:
        there = compress(torch.ones_like(exact[0]), cells, layout, POOLS["mean"].entries) != 0
        dout = torch.where(there, dout, torch.nan)
    gradients = torch.autograd.grad(found, inputs, dout)
    return (found, *gradients), (wanted, *torch.autograd.grad(wanted, exact, dout.double()))


@pytest.mark.interpret
@pytest.mark.parametrize("layout_kind", LAYOUTS)
@pytest.mark.parametrize("kind", STREAMED)
def test_kernels_agree_with_torch(kind: str, layout_kind: str) -> None:
    x, layout, _ = case_of(layout_kind)
    for cells in CELLS:
        found, wanted = both(x, layout, cells, kind, torch.float64)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.interpret
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float16, 2e-3)])
@pytest.mark.parametrize("kind", STREAMED)
def test_kernels_in_lower_precision(kind: str, dtype: torch.dtype, bound: float) -> None:
    """Each result within `bound` of its largest value."""
    x, layout, _ = case_of("packed", dtype, 24)
    found, wanted = both(x, layout, Cells(8, 4), kind, dtype)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).abs().max() <= bound * other.abs().max()


@pytest.mark.interpret
@pytest.mark.parametrize("kind", STREAMED)
def test_kernels_take_any_strides(kind: str) -> None:
    """Tokens before heads, and vectors that are not contiguous."""
    x = torch.randn(2, 37, DIM, HEADS, dtype=torch.float64).permute(0, 3, 1, 2)
    layout = dense(x)
    weights = list(weights_of(kind, 8).values())
    found = entries_forward(x, Cells(8, 4), layout, kind, *weights)
    assert torch.equal(found, entries_forward(x.contiguous(), Cells(8, 4), layout, kind, *weights))
    dout = torch.randn(2, found.shape[2], HEADS, DIM, dtype=torch.float64).transpose(1, 2)
    gradients = entries_backward(dout, x, Cells(8, 4), layout, kind, *weights)
    wanted = entries_backward(dout.contiguous(), x.contiguous(), Cells(8, 4), layout, kind, *weights)
    for one, other in zip(gradients, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.interpret
@pytest.mark.parametrize("kind, sign", [("max", 1), ("min", -1)])
def test_ties_and_nan_of_an_extreme(kind: str, sign: int) -> None:
    x = sign * torch.tensor([1.0, 3.0, 3.0, 0.0, torch.nan, torch.nan, 5.0, 1.0]).view(1, 1, 8, 1)
    layout = dense(x)
    found = entries_forward(x, Cells(4, 2), layout, kind).flatten()
    torch.testing.assert_close(
        found, POOLS[kind].entries(cells_of(x, Cells(4, 2), layout), None).flatten(), equal_nan=True
    )
    (dx,) = entries_backward(torch.ones(1, 1, 3, 1), x, Cells(4, 2), layout, kind)
    assert dx.flatten().tolist() == [0, 1, 0, 0, 2, 0, 0, 0]


def launches_of(monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype, packed: bool, dim: int) -> list[Launch]:
    """What a forward and a backward launch, without running it."""
    found: list[Launch] = []

    def note(kernel: Any, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
        assert min(grid) > 0
        found.append(specialise(kernel, args, named))

    monkeypatch.setattr(entry_launch, "launch", note)
    x = torch.empty(1 if packed else 2, 4, 4096, dim, dtype=dtype)
    cu_seqlens = torch.tensor([0, 1000, 4096], dtype=torch.int32) if packed else None
    layout = layout_of(x, x, Options(cu_seqlens))
    weights = {"weight": torch.empty(4, 32), "position": torch.empty(4, 32, dim)} if kind == "weighted" else {}
    cells = Cells(32, 16, before=16, partial=packed)
    out = entries_forward(x, cells, layout, kind, *weights.values())
    entries_backward(torch.empty_like(out), x, cells, layout, kind, *weights.values())
    return found


SIZES = [(torch.bfloat16, True, 128)]
MORE = [(torch.float16, False, 192), (torch.float32, False, 64), (torch.float32, True, 256)]


@pytest.mark.crosscompile
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize(
    "dtype, packed, dim", [*SIZES, *(pytest.param(*size, marks=pytest.mark.full) for size in MORE)]
)
@pytest.mark.parametrize("kind", STREAMED)
def test_kernels_compile(
    kind: str, dtype: torch.dtype, packed: bool, dim: int, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = launches_of(monkeypatch, kind, dtype, packed, dim)
    again = ["pool_entries", "spread_entries"]
    more = {"max": again, "min": again, "weighted": ["spread_entries", "weight_sums"]}
    assert [launch.name for launch in launches] == ["pool_entries", *more.get(kind, ["spread_entries"])]
    for launch in launches:
        compiled = compile_launch(launch, targets.find(target))
        assert compiled.error is None
        assert compiled.fits
        assert compiled.spills == 0
