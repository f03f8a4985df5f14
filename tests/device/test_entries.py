"""Compressed streams: pools and kernels against entries computed one by one, in every layout."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from spdsl import targets
from spdsl.device import entry_kernels
from spdsl.device.entries import (
    Cells,
    cells_of,
    compress,
    entry_count,
    entry_room,
    entry_spans,
    pool_max,
    pool_mean,
    pool_mlp,
    pool_softmax,
    pool_weighted,
)
from spdsl.device.entry_kernels import entries_backward, entries_forward
from spdsl.device.sequences import Layout, layout_of
from spdsl.runtime.crosscompile import compile_launch
from spdsl.runtime.launches import Launch, specialise
from tests.device.syncs import NoSync

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
HEADS, DIM, HIDDEN = 2, 6, 5
CELLS = [Cells(8, 4), Cells(4, 4), Cells(5, 3), Cells(7, 2), Cells(1, 1), Cells(3, 5)]
LAYOUTS = ("dense", "short", "none", "packed", "packed inside", "one packed", "padded")
KINDS = ("mean", "max", "weighted", "mlp", "softmax")
STREAMED = ("mean", "max", "weighted")

PACKED = {"packed": [0, 9, 9, 12, 30, 37], "packed inside": [3, 14, 31], "one packed": [0, 37]}
LENGTHS = [0, 2, 11, 36, 37]

Weights = dict[str, Tensor]


class Case(NamedTuple):
    """Tokens [B, H, M, D] with NaN wherever no sequence has one; sequences as (batch rows, tokens)."""

    x: Tensor
    layout: Layout
    sequences: list[tuple[slice, slice]]


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """torch.empty gives NaN: an element that nobody writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def case_of(kind: str, dtype: torch.dtype = torch.float64, dim: int = DIM) -> Case:
    torch.manual_seed(0)
    tokens = {"short": 3, "none": 0}.get(kind, 37)
    batch = {"padded": len(LENGTHS)}.get(kind, 1 if kind in PACKED else 2)
    x = torch.randn(batch, HEADS, tokens, dim, dtype=torch.float64).to(dtype)
    cu_seqlens, lengths, sequences = None, None, [(slice(None), slice(0, tokens))]
    if kind in PACKED:
        cu_seqlens = torch.tensor(PACKED[kind], dtype=torch.int32)
        sequences = [(slice(0, 1), slice(*bounds)) for bounds in pairwise(PACKED[kind])]
    if kind == "padded":
        lengths = torch.tensor(LENGTHS)
        sequences = [(slice(s, s + 1), slice(tokens - count, tokens)) for s, count in enumerate(LENGTHS)]
    used = torch.zeros(batch, tokens, dtype=torch.bool)
    for rows, own in sequences:
        used[rows, own] = True
    layout = layout_of(x, x, cu_seqlens, None, lengths, None, None)
    return Case(x.masked_fill(~used[:, None, :, None], torch.nan), layout, sequences)


def dense(x: Tensor) -> Layout:
    return layout_of(x, x, None, None, None, None, None)


def weights_of(kind: str, width: int, dtype: torch.dtype = torch.float64, dim: int = DIM) -> Weights:
    torch.manual_seed(1)
    shapes = {
        "weight": (HEADS, width),
        "position": (HEADS, width, dim),
        "up": (HEADS, width, dim, HIDDEN),
        "down": (HEADS, HIDDEN, dim),
    }
    roles = {"weighted": ["weight", "position"], "mlp": ["position", "up", "down"]}.get(kind, [])
    return {role: torch.randn(*shapes[role], dtype=torch.float64).to(dtype) for role in roles}


def pool_of(kind: str, weights: Weights, z: Callable[[], Tensor]) -> Callable[[Tensor], Tensor]:
    pools: dict[str, Callable[[Tensor], Tensor]] = {
        "mean": pool_mean,
        "max": pool_max,
        "weighted": lambda c: pool_weighted(c, **weights),
        "mlp": lambda c: pool_mlp(c, **weights),
        "softmax": lambda c: pool_softmax(c, z()),
    }
    return pools[kind]


def entry(kind: str, c: Tensor, weights: Weights, z: Tensor) -> Tensor:
    """One entry [B, H, D] of one cell [B, H, width, D], by the formulas."""
    if kind == "mean":
        return c.sum(2) / c.shape[2]
    if kind == "max":
        return torch.stack([c[:, :, w] for w in range(c.shape[2])]).amax(0)
    if kind == "softmax":
        e = torch.exp(z)
        return (e * c).sum(2) / e.sum(2)
    heads = []
    for h in range(c.shape[1]):
        moved = c[:, h] + weights["position"][h]
        if kind == "weighted":
            heads.append(sum(weights["weight"][h, w] * moved[:, w] for w in range(c.shape[2])))
        else:
            y = torch.einsum("bwd,wdn->bn", moved, weights["up"][h])
            heads.append((y * 0.5 * (1 + torch.erf(y / 2**0.5))) @ weights["down"][h])
    return torch.stack(heads, 1)


def wanted_entries(kind: str, case: Case, z: Tensor, cells: Cells, weights: Weights) -> Tensor:
    """Sequence by sequence, entry by entry; 0 elsewhere."""
    x, filled = case.x, 0
    out = x.new_zeros(x.shape[0], HEADS, entry_room(x, cells, case.layout), x.shape[3])
    for rows, tokens in case.sequences:
        for start in range(tokens.start, tokens.stop - cells.width + 1, cells.stride):
            cell = slice(start, start + cells.width)
            out[rows, :, filled] = entry(kind, x[rows, :, cell], weights, z[rows, :, cell])
            filled += 1
        filled = filled if len(x) == 1 else 0
    return out


@pytest.mark.parametrize("layout_kind", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_pools_follow_the_formulas(kind: str, layout_kind: str) -> None:
    case = case_of(layout_kind)
    x, layout = case.x, case.layout
    z = x.flip(3)
    for cells in CELLS:
        weights = weights_of(kind, cells.width)
        found = compress(x, cells, layout, pool_of(kind, weights, lambda c=cells: cells_of(z, c, layout)))
        wanted = wanted_entries(kind, case, z, cells, weights)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_entry_counts_and_spans() -> None:
    for cells in CELLS:
        for tokens in range(20):
            whole = [i for i in range(20) if i * cells.stride + cells.width <= tokens]
            assert entry_count(tokens, cells) == len(whole)
    spans = torch.tensor([[3, 9], [12, 0], [12, 3], [15, 8]], dtype=torch.int32)
    assert entry_spans(spans, Cells(4, 2), packed=True).tolist() == [[0, 3], [3, 0], [3, 0], [3, 3]]
    assert entry_spans(spans, Cells(4, 2), packed=False).tolist() == [[0, 3], [0, 0], [0, 0], [0, 3]]
    assert entry_spans(spans, Cells(4, 2), packed=True).dtype == torch.int32


def test_packed_entries_always_have_room() -> None:
    for cells in CELLS:
        for length in range(1, 12):
            bounds = torch.arange(0, 60 // length * length + 1, length, dtype=torch.int32)
            x = torch.zeros(1, 1, int(bounds[-1]), 1)
            layout = layout_of(x, x, bounds, None, None, None, None)
            assert layout.k_spans is not None
            spans = entry_spans(layout.k_spans, cells, packed=True)
            assert int(spans[-1].sum()) <= entry_room(x, cells, layout)


@pytest.mark.parametrize("layout_kind", LAYOUTS)
def test_no_length_is_read_on_the_host(layout_kind: str) -> None:
    x, layout, _ = case_of(layout_kind)
    x.requires_grad_()
    with NoSync():
        found = compress(x, Cells(8, 4), layout, pool_mean)
        torch.autograd.grad(found.sum(), x)


def test_dense_cells_are_a_view() -> None:
    x = torch.randn(2, HEADS, 40, DIM)
    c = cells_of(x, Cells(8, 4), dense(x))
    assert c.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@pytest.mark.parametrize("layout_kind", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_pools(kind: str, layout_kind: str) -> None:
    full, layout, _ = case_of(layout_kind)
    cells = Cells(8, 4)
    x = full.nan_to_num().requires_grad_()  # finite differences also move what no sequence has
    z = torch.randn_like(full, requires_grad=True)
    weights = {role: w.requires_grad_() for role, w in weights_of(kind, cells.width).items()}

    def function(x: Tensor, z: Tensor, *given: Tensor) -> Tensor:
        named = dict(zip(weights, given, strict=True))
        return compress(x, cells, layout, pool_of(kind, named, lambda: cells_of(z, cells, layout)))

    assert torch.autograd.gradcheck(function, (x, z, *weights.values()), fast_mode=True)


@pytest.mark.parametrize("layout_kind", ["packed", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_and_zero_outside_of_sequences(kind: str, layout_kind: str) -> None:
    """With NaN in the tokens that no sequence has, and in the gradient of entries that are not there."""
    x, layout, _ = case_of(layout_kind)
    outside = x.isnan()
    x.requires_grad_()
    cells = Cells(8, 4)
    weights = {role: w.requires_grad_() for role, w in weights_of(kind, cells.width).items()}
    found = compress(x, cells, layout, pool_of(kind, weights, lambda: cells_of(x, cells, layout)))
    dout = torch.ones_like(found).masked_fill(found == 0, torch.nan)
    gradients = torch.autograd.grad(found, [x, *weights.values()], dout)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[0][outside].count_nonzero() == 0


def test_the_first_maximum_takes_the_gradient() -> None:
    x = torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0, 2.0]).view(1, 1, 6, 1).requires_grad_()
    found = compress(x, Cells(4, 2), dense(x), pool_max)
    (dx,) = torch.autograd.grad(found.sum(), x)
    assert dx.flatten().tolist() == [0, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_bit_inputs_are_summed_in_float32(kind: str, dtype: torch.dtype) -> None:
    """The result rounds once; the MLP, whose hidden layer is rounded too, stays near that."""
    x, layout, _ = case_of("packed", dtype)
    cells = Cells(8, 4)
    weights = weights_of(kind, cells.width, dtype)
    exact = {role: w.double() for role, w in weights.items()}
    found = compress(x, cells, layout, pool_of(kind, weights, lambda: cells_of(x, cells, layout)))
    wanted = compress(x.double(), cells, layout, pool_of(kind, exact, lambda: cells_of(x.double(), cells, layout)))
    assert found.dtype == dtype
    unit = torch.finfo(dtype).eps
    allowed = unit * wanted.abs() + 1e-5 if kind != "mlp" else unit * wanted.abs().max()
    assert ((found.double() - wanted).abs() <= allowed).all()


# Kernels


class Streamed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cells: Cells, layout: Layout, by: str, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        ctx.call = (cells, layout, by)
        return entries_forward(x, cells, layout, by, *weights)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        x, *weights = ctx.saved_tensors
        dx, dweight, dposition = entries_backward(dout, x, *ctx.call, *weights)
        return (dx, None, None, None, *((dweight, dposition) if weights else ()))


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
        there = compress(torch.ones_like(exact[0]), cells, layout, pool_mean) != 0
        dout = torch.where(there, dout, torch.nan)
    gradients = torch.autograd.grad(found, inputs, dout)
    return (found, *gradients), (wanted, *torch.autograd.grad(wanted, exact, dout.double()))


@pytest.fixture
def interpreter() -> None:
    if not INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1")


@pytest.mark.interpret
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("layout_kind", LAYOUTS)
@pytest.mark.parametrize("kind", STREAMED)
def test_kernels_agree_with_torch(kind: str, layout_kind: str) -> None:
    x, layout, _ = case_of(layout_kind)
    for cells in (Cells(8, 4), Cells(5, 3), Cells(3, 5)):
        found, wanted = both(x, layout, cells, kind, torch.float64)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.interpret
@pytest.mark.usefixtures("interpreter")
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
@pytest.mark.usefixtures("interpreter")
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
        assert one is other is None or torch.equal(one, other)


@pytest.mark.interpret
@pytest.mark.usefixtures("interpreter")
def test_ties_and_nan_of_the_maximum() -> None:
    x = torch.tensor([1.0, 3.0, 3.0, 0.0, torch.nan, torch.nan, 5.0, 1.0]).view(1, 1, 8, 1)
    layout = dense(x)
    found = entries_forward(x, Cells(4, 2), layout, "max").flatten()
    torch.testing.assert_close(found, pool_max(cells_of(x, Cells(4, 2), layout)).flatten(), equal_nan=True)
    dx, _, _ = entries_backward(torch.ones(1, 1, 3, 1), x, Cells(4, 2), layout, "max")
    assert dx.flatten().tolist() == [0, 1, 0, 0, 2, 0, 0, 0]


def launches_of(monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype, packed: bool, dim: int) -> list[Launch]:
    """What a forward and a backward launch, without running it."""
    found: list[Launch] = []

    def note(kernel: Any, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
        assert min(grid) > 0
        found.append(specialise(kernel, args, named))

    monkeypatch.setattr(entry_kernels, "launch", note)
    x = torch.empty(1 if packed else 2, 4, 4096, dim, dtype=dtype)
    cu_seqlens = torch.tensor([0, 1000, 4096], dtype=torch.int32) if packed else None
    layout = layout_of(x, x, cu_seqlens, None, None, None, None)
    weights = {"weight": torch.empty(4, 32), "position": torch.empty(4, 32, dim)} if kind == "weighted" else {}
    out = entries_forward(x, Cells(32, 16), layout, kind, **weights)
    entries_backward(torch.empty_like(out), x, Cells(32, 16), layout, kind, **weights)
    return found


SIZES = [(torch.bfloat16, True, 128)]
MORE = [(torch.float16, False, 192), (torch.float32, False, 64), (torch.float32, True, 256)]


@pytest.mark.crosscompile
@pytest.mark.skipif(INTERPRETED, reason="needs compiled kernels")
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize(
    "dtype, packed, dim", [*SIZES, *(pytest.param(*size, marks=pytest.mark.full) for size in MORE)]
)
@pytest.mark.parametrize("kind", STREAMED)
def test_kernels_compile(
    kind: str, dtype: torch.dtype, packed: bool, dim: int, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = launches_of(monkeypatch, kind, dtype, packed, dim)
    more = {"max": ["pool_entries", "spread_entries"], "weighted": ["spread_entries", "weight_sums"]}
    assert [launch.name for launch in launches] == ["pool_entries", *more.get(kind, ["spread_entries"])]
    for launch in launches:
        compiled = compile_launch(launch, targets.find(target))
        assert compiled.error is None
        assert compiled.fits
        assert compiled.spills == 0
