"""Compressed streams: pools against entries computed one by one, in every layout."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from spdsl.runtime.call.layouts import Options, layout_of
from spdsl.runtime.entries.entries import (
    Cells,
    cells_of,
    compress,
    entry_count,
    entry_counts,
    entry_room,
    entry_spans,
)
from spdsl.runtime.pools.table import POOLS
from tests.runtime.entry_cases import (
    DIM,
    HEADS,
    KINDS,
    LAYOUTS,
    Case,
    Weights,
    case_of,
    dense,
    pool_of,
    weights_of,
)
from tests.runtime.syncs import NoSync

pytestmark = pytest.mark.usefixtures("poisoned")
CELLS = [Cells(8, 4), Cells(4, 4), Cells(5, 3), Cells(7, 2), Cells(1, 1), Cells(3, 5)]
EARLY = [Cells(8, 4, before=1), Cells(8, 4, before=4), Cells(5, 3, before=4), Cells(4, 4, before=3)]
CUT = [Cells(8, 4, partial=True), Cells(4, 4, partial=True), Cells(7, 3, before=5, partial=True)]
CELLS += [*EARLY, *CUT, Cells(2, 1, before=1, partial=True)]


def entry(kind: str, c: Tensor, places: slice, weights: Weights, z: Tensor) -> Tensor:
    """One entry [B, H, D] of the tokens of one cell [B, H, tokens, D] at some of its places, by the formulas."""
    if kind == "mean":
        return c.sum(2) / c.shape[2]
    if kind in ("max", "min"):
        tokens = torch.stack([c[:, :, w] for w in range(c.shape[2])])
        return tokens.amax(0) if kind == "max" else tokens.amin(0)
    if kind == "softmax":
        e = torch.exp(z)
        return (e * c).sum(2) / e.sum(2)
    heads = []
    for h in range(c.shape[1]):
        moved = c[:, h] + weights["position"][h, places]
        if kind == "weighted":
            heads.append(sum(weights["weight"][h, places][w] * moved[:, w] for w in range(c.shape[2])))
        else:
            y = torch.einsum("bwd,wdn->bn", moved, weights["up"][h, places])
            heads.append((y * 0.5 * (1 + torch.erf(y / 2**0.5))) @ weights["down"][h])
    return torch.stack(heads, 1)


def cells_in(tokens: slice, cells: Cells) -> Iterator[tuple[slice, slice]]:
    """The tokens of each cell of a sequence, and their places in it."""
    start = tokens.start - cells.before
    while tokens.start < tokens.stop:
        end = start + cells.width
        if end > tokens.stop and not cells.partial:
            return
        own = slice(max(start, tokens.start), min(end, tokens.stop))
        yield own, slice(own.start - start, own.stop - start)
        if end >= tokens.stop:
            return
        start += cells.stride


def wanted_entries(kind: str, case: Case, z: Tensor, cells: Cells, weights: Weights) -> Tensor:
    """Sequence by sequence, entry by entry; 0 elsewhere."""
    x, filled = case.x, 0
    out = x.new_zeros(x.shape[0], HEADS, entry_room(x, cells, case.layout), x.shape[3])
    for rows, tokens in case.sequences:
        for cell, places in cells_in(tokens, cells):
            out[rows, :, filled] = entry(kind, x[rows, :, cell], places, weights, z[rows, :, cell])
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
        every = torch.arange(30, dtype=torch.int32)
        found = entry_counts(every, cells)
        assert found.dtype == torch.int32
        for tokens in range(30):
            count = len(list(cells_in(slice(0, tokens), cells)))
            assert entry_count(tokens, cells) == count == int(found[tokens])
            if cells.partial and tokens:
                covered = {token for cell, _ in cells_in(slice(0, tokens), cells) for token in range(30)[cell]}
                assert covered == set(range(tokens))
    spans = torch.tensor([[3, 9], [12, 0], [12, 3], [15, 8]], dtype=torch.int32)
    assert entry_spans(spans, Cells(4, 2), packed=True).tolist() == [[0, 3], [3, 0], [3, 0], [3, 3]]
    assert entry_spans(spans, Cells(4, 2), packed=False).tolist() == [[0, 3], [0, 0], [0, 0], [0, 3]]
    assert entry_spans(spans, Cells(4, 2), packed=True).dtype == torch.int32


def test_packed_entries_always_have_room() -> None:
    for cells in CELLS:
        for length in range(1, 24):
            bounds = torch.arange(0, 60 // length * length + 1, length, dtype=torch.int32)
            x = torch.zeros(1, 1, int(bounds[-1]), 1)
            layout = layout_of(x, x, Options(bounds))
            assert layout.k_spans is not None
            spans = entry_spans(layout.k_spans, cells, packed=True)
            assert int(spans[-1].sum()) <= entry_room(x, cells, layout)


@pytest.mark.parametrize("layout_kind", LAYOUTS)
@pytest.mark.parametrize("cells", [Cells(8, 4), Cells(8, 4, before=5, partial=True)])
def test_no_length_is_read_on_the_host(cells: Cells, layout_kind: str) -> None:
    x, layout, _ = case_of(layout_kind)
    x.requires_grad_()
    with NoSync():
        found = compress(x, cells, layout, POOLS["mean"].entries)
        torch.autograd.grad(found.sum(), x)


def test_dense_cells_are_a_view() -> None:
    x = torch.randn(2, HEADS, 40, DIM)
    c = cells_of(x, Cells(8, 4), dense(x))
    assert c.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@pytest.mark.parametrize("layout_kind", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cells", [Cells(8, 4), Cells(8, 4, before=5, partial=True)])
def test_gradients_of_pools(cells: Cells, kind: str, layout_kind: str) -> None:
    full, layout, _ = case_of(layout_kind)
    x = full.nan_to_num().requires_grad_()  # finite differences also move what no sequence has
    z = torch.randn_like(full, requires_grad=True)
    weights = {role: w.requires_grad_() for role, w in weights_of(kind, cells.width).items()}

    def function(x: Tensor, z: Tensor, *given: Tensor) -> Tensor:
        named = dict(zip(weights, given, strict=True))
        return compress(x, cells, layout, pool_of(kind, named, lambda: cells_of(z, cells, layout)))

    assert torch.autograd.gradcheck(function, (x, z, *weights.values()), fast_mode=True)


@pytest.mark.parametrize("layout_kind", ["packed", "padded"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cells", [Cells(8, 4), Cells(8, 4, before=5, partial=True)])
def test_gradients_are_finite_and_zero_outside_of_sequences(cells: Cells, kind: str, layout_kind: str) -> None:
    """With NaN in the tokens that no sequence has, and in the gradient of entries that are not there."""
    x, layout, _ = case_of(layout_kind)
    outside = x.isnan()
    x.requires_grad_()
    weights = {role: w.requires_grad_() for role, w in weights_of(kind, cells.width).items()}
    found = compress(x, cells, layout, pool_of(kind, weights, lambda: cells_of(x, cells, layout)))
    dout = torch.ones_like(found).masked_fill(found == 0, torch.nan)
    gradients = torch.autograd.grad(found, [x, *weights.values()], dout)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[0][outside].count_nonzero() == 0


def test_the_first_maximum_takes_the_gradient() -> None:
    x = torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0, 2.0]).view(1, 1, 6, 1).requires_grad_()
    found = compress(x, Cells(4, 2), dense(x), POOLS["max"].entries)
    (dx,) = torch.autograd.grad(found.sum(), x)
    assert dx.flatten().tolist() == [0, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_bit_inputs_are_summed_in_float32(kind: str, dtype: torch.dtype) -> None:
    """The result rounds once; the MLP, whose hidden layer is rounded too, stays near that."""
    x, layout, _ = case_of("packed", dtype)
    cells = Cells(8, 4, before=4)
    weights = weights_of(kind, cells.width, dtype)
    exact = {role: w.double() for role, w in weights.items()}
    found = compress(x, cells, layout, pool_of(kind, weights, lambda: cells_of(x, cells, layout)))
    wanted = compress(x.double(), cells, layout, pool_of(kind, exact, lambda: cells_of(x.double(), cells, layout)))
    assert found.dtype == dtype
    unit = torch.finfo(dtype).eps
    allowed = unit * wanted.abs() + 1e-5 if kind != "mlp" else unit * wanted.abs().max()
    assert ((found.double() - wanted).abs() <= allowed).all()
