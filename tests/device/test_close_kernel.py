"""Closing entries by kernels: what the torch path writes, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spdsl import targets
from spdsl.device import close_kernel
from spdsl.device.cache import EntryShape, EntryStore, StreamShape
from spdsl.device.entries import Cells, pool_mean, pool_softmax
from spdsl.runtime.crosscompile import compile_launch
from spdsl.runtime.launches import Launch, specialise

pytestmark = pytest.mark.usefixtures("poisoned")
BATCH, HEADS, QK, V, CAPACITY = 3, 2, 24, 10, 72
STARTS = [0, 13, 45]
# The second sequence has a hole, the third one ends early.
TABLE = torch.tensor([[9, 3, 0, 16, 7], [5, 1, -1, 12, 2], [4, 11, 8, 15, -1]], dtype=torch.int32)


def store_of(cells: Cells, page: int | None, added: int, dtype: torch.dtype = torch.float64) -> EntryStore:
    """Sequences of different lengths behind `added` new tokens; all that holds no token is NaN."""
    shape = StreamShape(HEADS, QK, V)
    found = EntryStore(
        BATCH,
        CAPACITY,
        {"kv": shape, "bare": StreamShape(HEADS, QK, 0), "full": shape},
        {},
        {"cmp": EntryShape(HEADS, QK, V, cells), "keys": EntryShape(HEADS, QK, 0, cells)},
        page=page,
        device="cpu",
        dtype=dtype,
        page_table=None if page is None else TABLE,
    )
    for store in [*found.k.values(), *found.v.values()]:
        store.fill_(torch.nan)
    torch.manual_seed(added)
    for count, start in ((max(STARTS), 0), (added, None)):
        if start is None:
            found.lengths.copy_(torch.tensor(STARTS))
        k = {name: torch.randn(BATCH, HEADS, count, QK, dtype=dtype) for name in ("kv", "bare", "full")}
        v = {name: torch.randn(BATCH, HEADS, count, V, dtype=dtype) for name in ("kv", "full")}
        found._append_by_torch(k, v, {}, count)
    return found


def same_entries(found: EntryStore, wanted: EntryStore, name: str) -> None:
    """All entries but the spare one, which torch alone writes."""
    for own, other in ((found.k, wanted.k), (found.v, wanted.v)):
        if name in own:
            assert own[name][:, :, -1].isnan().all(), "the spare entry is free"
            torch.testing.assert_close(
                own[name][:, :, :-1], other[name][:, :, :-1], rtol=0, atol=1e-12, equal_nan=True
            )  # fmt: skip
    assert found.entry_spans[name].tolist() == [[0, count] for count in wanted.entry_lengths(name).tolist()]


@pytest.mark.interpret
@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("added", [0, 1, 7, 40])
def test_kernels_close_what_torch_closes(added: int, page: int | None) -> None:
    """Over holes and past the capacity, too."""
    for cells in (Cells(8, 4), Cells(3, 5), Cells(20, 1), Cells(8, 4, before=7)):
        found, wanted = store_of(cells, page, added), store_of(cells, page, added)
        found._close_by_kernels("cmp", "kv", added, pool_mean, pool_mean, None)
        wanted._close_by_torch("cmp", "kv", added, pool_mean, pool_mean, None)
        if added:
            same_entries(found, wanted, "cmp")
        assert found.k["keys"].isnan().all()


@pytest.mark.interpret
@pytest.mark.parametrize("logits", ["bare", "full"])
def test_softmax_of_another_stream(logits: str) -> None:
    """Values are weighed by the values of that stream, or by its keys where it has none."""

    def pool_v(c: Tensor, there: Tensor | None, z: Tensor) -> Tensor:
        return pool_softmax(c, there, z[..., :1])

    for cells in (Cells(5, 3), Cells(5, 3, before=4)):
        found, wanted = store_of(cells, 16, 7), store_of(cells, 16, 7)
        found._close_by_kernels("cmp", "kv", 7, pool_softmax, pool_v, logits)
        wanted._close_by_torch("cmp", "kv", 7, pool_softmax, pool_v, logits)
        same_entries(found, wanted, "cmp")


@pytest.mark.interpret
def test_keys_alone_and_pools_of_any_strides() -> None:
    def apart(c: Tensor, there: Tensor | None) -> Tensor:
        return pool_mean(c, there).transpose(2, 3).contiguous().transpose(2, 3)

    found, wanted = store_of(Cells(8, 4), 16, 40), store_of(Cells(8, 4), 16, 40)
    found._close_by_kernels("keys", "bare", 40, apart, None, None)
    wanted._close_by_torch("keys", "bare", 40, pool_mean, None, None)
    same_entries(found, wanted, "keys")


def launches_of(monkeypatch: pytest.MonkeyPatch, added: int, page: int | None) -> list[Launch]:
    """What closing launches, without running it."""
    found: list[Launch] = []

    def note(kernel: Any, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
        assert min(grid) > 0
        found.append(specialise(kernel, args, named))

    monkeypatch.setattr(close_kernel, "launch", note)
    cells = Cells(32, 16, before=16)
    store = EntryStore(
        2, 4096, {"kv": StreamShape(4, 192, 128)}, {}, {"cmp": EntryShape(4, 192, 128, cells)},
        page=page, device="cpu", dtype=torch.bfloat16, page_table=None,
    )  # fmt: skip
    store._close_by_kernels("cmp", "kv", added, pool_mean, pool_mean, None)
    return found


@pytest.mark.crosscompile
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize(
    "added, page", [(400, 64), *(pytest.param(1, page, marks=pytest.mark.full) for page in (64, None))]
)
def test_kernels_compile(added: int, page: int | None, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = launches_of(monkeypatch, added, page)
    assert [launch.name for launch in launches] == ["take_cells", "put_entries"]
    for launch in launches:
        compiled = compile_launch(launch, targets.find(target))
        assert compiled.error is None
        assert compiled.fits
        assert compiled.spills == 0
