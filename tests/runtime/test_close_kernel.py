"""Closing entries by kernels: what the torch path writes, and nothing else."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from spdsl import targets
from spdsl.machine.crosscompile import compile_launch
from spdsl.machine.launches import Launch, specialise
from spdsl.runtime.cache import cache
from spdsl.runtime.cache.cache import EntryShape, EntryStore, StreamShape
from spdsl.runtime.entries import close_kernel, close_mlp, close_streamed
from spdsl.runtime.entries.entries import Cells
from spdsl.runtime.pools.pool import Pool
from spdsl.runtime.pools.table import POOLS
from spdsl.runtime.tuning.gpu import use_tables

pytestmark = pytest.mark.usefixtures("poisoned")
HEADS, QK, V, CAPACITY = 2, 24, 10, 72
HIDDEN = {"k": 20, "v": 37}
STARTS = [0, 13, 45]
# The second sequence has a hole, the third one ends early.
TABLE = torch.tensor([[9, 3, 0, 16, 7], [5, 1, -1, 12, 2], [4, 11, 8, 15, -1]], dtype=torch.int32)
CELLS = (Cells(8, 4), Cells(3, 5), Cells(20, 2), Cells(8, 4, before=7))


class Way(NamedTuple):
    """How entries are made, in torch and by kernels, with which stream that weighs tokens."""

    pool: Pool
    logits: str | None = None


WAYS = {
    "mean": Way(POOLS["mean"]),
    "max": Way(POOLS["max"]),
    "min": Way(POOLS["min"]),
    "weighted": Way(POOLS["weighted"]),
    "softmax": Way(POOLS["softmax"], "full"),
    "softmax of one number": Way(POOLS["softmax"], "narrow"),
    "mlp": Way(POOLS["mlp"]),
    "any pool": Way(POOLS["mlp"]._replace(close=close_kernel.close_by_pool)),
}


def weights_of(way: Way, side: str, width: int, dtype: torch.dtype, heads: int = HEADS) -> tuple[Tensor, ...]:
    dim, hidden = {"k": QK, "v": V}[side], HIDDEN[side]
    shapes: dict[str, list[tuple[int, ...]]] = {
        "weighted": [(width,), (width, dim)],
        "mlp": [(width, dim), (width, dim, hidden), (hidden, dim)],
    }
    return tuple(torch.randn(heads, *shape, dtype=torch.float64).to(dtype) for shape in shapes.get(way.pool.name, []))


def store_of(cells: Cells, page: int | None, starts: list[int], added: int, dtype: torch.dtype) -> EntryStore:
    """Sequences of different lengths behind `added` new tokens; all that holds no token is NaN."""
    batch, shape = len(starts), StreamShape(HEADS, QK, V)
    table = None if page is None or batch != len(TABLE) else TABLE
    found = EntryStore(
        batch,
        CAPACITY,
        {"kv": shape, "bare": StreamShape(HEADS, QK, 0), "full": shape, "narrow": StreamShape(HEADS, 1, 0)},
        {},
        {"cmp": EntryShape(HEADS, QK, V, cells), "keys": EntryShape(HEADS, QK, 0, cells)},
        page=page,
        device="cpu",
        dtype=dtype,
        page_table=table,
    )
    for store in [*found.k.values(), *found.v.values()]:
        store.fill_(torch.nan)
    torch.manual_seed(added)
    for count, lengths in ((max(starts), None), (added, starts)):
        if lengths is not None:
            found.lengths.copy_(torch.tensor(lengths))
        dims = {"kv": QK, "bare": QK, "full": QK, "narrow": 1}
        k = {name: torch.randn(batch, HEADS, count, dim).to(dtype) for name, dim in dims.items()}
        v = {name: torch.randn(batch, HEADS, count, V).to(dtype) for name in ("kv", "full")}
        found._append_by_torch(k, v, {}, count)
    return found


def closed(
    way: str, cells: Cells, page: int | None, added: int, name: str = "cmp", starts: list[int] = STARTS,
    dtype: torch.dtype = torch.float64, exact: torch.dtype | None = None, learned: torch.dtype | None = None,
) -> tuple[EntryStore, EntryStore]:  # fmt: skip
    """The same entries closed by kernels and by torch, there in the dtype `exact`."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for by_kernels in (True, False):
            patch.setattr(cache, "uses_kernels", lambda _, uses=by_kernels: uses)
            store, own = store_of(cells, page, starts, added, dtype), WAYS[way]
            torch.manual_seed(7)
            of_k, of_v = (weights_of(own, side, cells.width, learned or dtype) for side in ("k", "v"))
            if exact is not None and not by_kernels:
                store.k, store.v = ({key: x.to(exact) for key, x in part.items()} for part in (store.k, store.v))
                of_k, of_v = (tuple(x.to(exact) for x in part) for part in (of_k, of_v))
            source, of_values = ("bare", None) if name == "keys" else ("kv", of_v)
            store.close(name, source, added, own.pool, of_k, of_values, logits=own.logits)
            found.append(store)
    return found[0], found[1]


def same_entries(found: EntryStore, wanted: EntryStore, name: str = "cmp") -> None:
    """All entries but the spare one, which torch alone writes."""
    for own, other in ((found.k, wanted.k), (found.v, wanted.v)):
        if name in own:
            assert own[name][:, :, -1].isnan().all(), "the spare entry is free"
            torch.testing.assert_close(
                own[name][:, :, :-1], other[name][:, :, :-1], rtol=0, atol=1e-10, equal_nan=True
            )  # fmt: skip
    assert found.entry_spans[name].tolist() == [[0, count] for count in wanted.entry_lengths(name).tolist()]


@pytest.mark.interpret
@pytest.mark.parametrize("added, page", [(0, 16), (1, None), (1, 16), (7, None), (40, 16)])
@pytest.mark.parametrize("way", WAYS)
def test_kernels_close_what_torch_closes(way: str, added: int, page: int | None) -> None:
    """Over holes and past the capacity, too."""
    for cells in CELLS[2:] if added == 40 else CELLS:
        found, wanted = closed(way, cells, page, added)
        if added:
            same_entries(found, wanted)
        assert found.k["keys"].isnan().all()


@pytest.mark.interpret
@pytest.mark.parametrize("way", WAYS)
def test_keys_alone(way: str) -> None:
    for cells, added in ((Cells(8, 4), 40), (Cells(8, 4, before=4), 1)):
        same_entries(*closed(way, cells, 16, added, "keys"), "keys")


@pytest.mark.interpret
@pytest.mark.parametrize("way", ["mean", "mlp"])
@pytest.mark.parametrize("batch", [16, 18])
def test_many_sequences_close_at_different_steps(way: str, batch: int) -> None:
    """The last one of a block, too, and blocks of which none closes."""
    for starts in ([3 + s for s in range(batch)], [8] * (batch - 1) + [11]):
        found, wanted = closed(way, Cells(8, 4), 16, 1, starts=starts)
        same_entries(found, wanted)


@pytest.mark.interpret
@pytest.mark.parametrize("way", ["softmax", "max"])
def test_cells_longer_than_what_is_loaded_at_once(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rows that are loaded may all lie before the sequence."""
    own = close_streamed._cell_side

    def few_rows(*args: Any) -> Any:
        return own(*args)._replace(ROWS=close_streamed.tl.constexpr(2))

    monkeypatch.setattr(close_streamed, "_cell_side", few_rows)
    for cells in (Cells(7, 3, before=5), Cells(8, 4)):
        same_entries(*closed(way, cells, 16, 7))


@pytest.mark.interpret
@pytest.mark.parametrize("way", ["weighted", "mlp"])
def test_weights_of_another_dtype(way: str) -> None:
    found, wanted = closed(way, Cells(8, 4), 16, 1, starts=[8, 11, 14], dtype=torch.float32, learned=torch.float64)
    assert not found.k["cmp"][1, :, 1].isnan().any()
    for own, other in ((found.k, wanted.k), (found.v, wanted.v)):
        torch.testing.assert_close(
            own["cmp"][:, :, :-1], other["cmp"][:, :, :-1], rtol=1e-4, atol=1e-4, equal_nan=True
        )  # fmt: skip


@pytest.mark.interpret
@pytest.mark.parametrize("kind", ["max", "min"])
def test_the_maximum_of_nan_is_nan(kind: str) -> None:
    x = torch.tensor([1.0, torch.nan, 3.0, -torch.inf, -torch.inf, 5.0, -0.0, torch.nan]).view(1, 1, 8, 1)
    store = EntryStore(
        1, 8, {"kv": StreamShape(1, 1, 0)}, {}, {"cmp": EntryShape(1, 1, 0, Cells(2, 1))},
        page=None, device="cpu", dtype=torch.float32, page_table=None,
    )  # fmt: skip
    store._append_by_torch({"kv": x}, {}, {}, 8)
    store.close("cmp", "kv", 8, POOLS[kind])
    wanted = POOLS[kind].entries(x.unfold(2, 2, 1).transpose(3, 4), None)
    torch.testing.assert_close(store.k["cmp"][:, :, :-1], wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.interpret
def test_a_step_that_closes_nothing_reads_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    products: list[int] = []
    dot = close_mlp.dot
    monkeypatch.setattr(close_mlp, "dot", lambda *args: products.append(1) or dot(*args))
    closed("mlp", Cells(8, 4), 16, 1, starts=[8, 9, 13])
    assert not products
    closed("mlp", Cells(8, 4), 16, 1, starts=[8, 11, 13])
    assert products


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("way", [way for way in WAYS if way != "any pool"])
def test_kernels_in_lower_precision(way: str, dtype: torch.dtype) -> None:
    """Twice the error of torch in the same dtype at most, 1.1 times on average; or as good as float32 can be."""
    cells, starts = Cells(8, 4, before=4), [3 + 4 * s for s in range(16)]
    found, exact = closed(way, cells, 16, 1, starts=starts, dtype=dtype, exact=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(WAYS, way, WAYS[way]._replace(pool=WAYS[way].pool._replace(close=_by_torch)))
        _, by_torch = closed(way, cells, 16, 1, starts=starts, dtype=dtype)
    for own, plain, meant in ((found.k, by_torch.k, exact.k), (found.v, by_torch.v, exact.v)):
        wanted = meant["cmp"][:, :, :-1]
        there = ~wanted.isnan()
        errors, others = ((x["cmp"][:, :, :-1] - wanted)[there].abs() for x in (own, plain))
        least = 1e-6 * wanted[there].abs().mean()
        assert errors.max() <= 2 * others.max() + least
        assert errors.mean() <= 1.1 * others.mean() + least / 10


def _by_torch(_: Any) -> None: ...


@pytest.mark.interpret
def test_pools_of_any_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    def apart(c: Tensor, there: Tensor | None) -> Tensor:
        return POOLS["mean"].entries(c, there).transpose(2, 3).contiguous().transpose(2, 3)

    monkeypatch.setitem(WAYS, "apart", Way(Pool("mean", apart, close_kernel.close_by_pool)))
    same_entries(*closed("apart", Cells(8, 4), 16, 40, "keys"), "keys")


def launches_of(monkeypatch: pytest.MonkeyPatch, way: str, added: int, page: int | None) -> list[Launch]:
    """What closing launches at the sizes of NSA, without running it."""
    found: list[Launch] = []

    def note(kernel: Any, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
        assert min(grid) > 0
        found.append(specialise(kernel, args, named))

    for place in (close_kernel, close_streamed, close_mlp):
        monkeypatch.setattr(place, "launch", note)
    monkeypatch.setattr(cache, "uses_kernels", lambda _: True)
    cells, own = Cells(32, 16, before=16), WAYS[way]
    shape = StreamShape(4, 192, 128)
    store = EntryStore(
        2, 4096, {"kv": shape, "full": shape}, {}, {"cmp": EntryShape(4, 192, 128, cells)},
        page=page, device="cpu", dtype=torch.bfloat16, page_table=None,
    )  # fmt: skip
    sizes = {"weighted": lambda d: [(32,), (32, d)], "mlp": lambda d: [(32, d), (32, d, 384), (384, d)]}
    weights = [
        tuple(torch.empty(4, *shape, dtype=torch.bfloat16) for shape in sizes.get(own.pool.name, lambda _: [])(dim))
        for dim in (192, 128)
    ]
    store.close("cmp", "kv", added, own.pool, *weights, logits=own.logits)
    return found


@pytest.mark.crosscompile
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize(
    "way, added, page",
    [
        ("mean", 400, 64), ("mlp", 1, 64),
        *(pytest.param(*case, marks=pytest.mark.full) for case in (
            ("max", 1, 64), ("min", 400, 64), ("weighted", 1, None), ("softmax", 400, 64), ("mlp", 1, None),
            ("mlp", 400, 64),
        )),
    ],
)  # fmt: skip
def test_kernels_compile(
    way: str, added: int, page: int | None, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    use_tables(target)
    try:
        launches = launches_of(monkeypatch, way, added, page)
    finally:
        use_tables(None)
    names = {"mlp": ["close_hidden", "close_outputs"] if added == 1 else ["take_cells", "put_entries"]}
    assert [launch.name for launch in launches] == names.get(way, ["close_cells"])
    for launch in launches:
        compiled = compile_launch(launch, targets.find(target))
        assert compiled.error is None
        assert compiled.fits
        assert compiled.spills == 0
