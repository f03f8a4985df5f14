"""Compressed streams in the cache: appended in any pieces, the entries are those of the whole sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from spdsl.runtime.cache.cache import CacheStore, StreamShape
from spdsl.runtime.cache.storage import EntryShape
from spdsl.runtime.call.layouts import Options, layout_of
from spdsl.runtime.entries.entries import Cells, cells_of, compress, entry_count
from spdsl.runtime.pools.pool import Pool
from spdsl.runtime.pools.table import POOLS
from tests.runtime.syncs import NoSync

BATCH, HEADS, QK, V, CAPACITY = 2, 3, 6, 4, 45
CELLS = [Cells(8, 4, before=4), Cells(5, 3), Cells(4, 4, before=3), Cells(3, 5), Cells(20, 1, before=7)]
PIECES = {"ones": [1] * 41, "threes": [3] * 13 + [2], "sevens": [7] * 5 + [6], "whole": [41], "mixed": [0, 5, 1, 30, 5]}

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def store_of(cells: Cells, page: int | None, table: Tensor | None = None, capacity: int = CAPACITY) -> CacheStore:
    """A cache whose memory is full of NaN."""
    shape = StreamShape(HEADS, QK, V)
    cache = CacheStore(
        BATCH,
        capacity,
        {"kv": shape, "bare": StreamShape(HEADS, QK, 0), "full": shape, "narrow": StreamShape(HEADS, 1, 0)},
        {},
        {"cmp": EntryShape(HEADS, QK, V, cells), "keys": EntryShape(HEADS, QK, 0, cells)},
        page=page,
        device="cpu",
        dtype=torch.float64,
        page_table=table,
    )
    for store in [*cache.k.values(), *cache.v.values()]:
        store.fill_(torch.nan)
    return cache


def tokens_of(count: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    dims = {"kv": QK, "bare": QK, "full": QK, "narrow": 1}
    k = {name: torch.randn(BATCH, HEADS, count, dim, dtype=torch.float64) for name, dim in dims.items()}
    v = {name: torch.randn(BATCH, HEADS, count, V, dtype=torch.float64) for name in ("kv", "full")}
    return k, v


def append(cache: CacheStore, k: dict[str, Tensor], v: dict[str, Tensor], part: slice) -> int:
    new_k, new_v = ({name: x[:, :, part] for name, x in side.items()} for side in (k, v))
    cache.append_tokens(new_k, new_v, {})
    return part.stop - part.start


def whole(x: Tensor, cells: Cells, pool: Callable[..., Tensor]) -> Tensor:
    return compress(x, cells, layout_of(x, x, Options()), pool)


class Way(NamedTuple):
    """How entries are made, in torch and by kernels, and the weights of keys and values."""

    pool: Pool
    of_k: tuple[Tensor, ...] = ()
    of_v: tuple[Tensor, ...] | None = ()

    def made(self, weights: tuple[Tensor, ...] | None) -> Callable[..., Tensor]:
        return lambda c, there: self.pool.entries(c, there, *(weights or ()))


MEAN = Way(POOLS["mean"])
SOFTMAX = Way(POOLS["softmax"])


def way_of(kind: str, width: int) -> Way:
    def weights(dim: int) -> tuple[Tensor, ...]:
        shapes = {
            "weighted": [(width,), (width, dim)],
            "mlp": [(width, dim), (width, dim, 5), (5, dim)],
        }.get(kind, [])  # fmt: skip
        return tuple(torch.randn(HEADS, *shape, dtype=torch.float64) for shape in shapes)

    return Way(POOLS[kind], weights(QK), weights(V))


@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("kind", ["mean", "max", "min", "weighted", "mlp"])
def test_pieces_make_the_entries_of_the_whole(kind: str, pieces: str, page: int | None) -> None:
    for cells in CELLS:
        k, v = tokens_of(41)
        way = way_of(kind, cells.width)
        cache, first = store_of(cells, page), 0
        wanted_k, wanted_v = whole(k["kv"], cells, way.made(way.of_k)), whole(v["kv"], cells, way.made(way.of_v))
        for added in PIECES[pieces]:
            cache.close("cmp", "kv", append(cache, k, v, slice(first, first + added)), *way)
            first += added
            count = entry_count(first, cells)
            assert cache.entry_lengths("cmp").tolist() == [count] * BATCH
            torch.testing.assert_close(cache.k["cmp"][:, :, :count], wanted_k[:, :, :count], rtol=0, atol=1e-12)
            torch.testing.assert_close(cache.v["cmp"][:, :, :count], wanted_v[:, :, :count], rtol=0, atol=1e-12)
            assert cache.k["cmp"][:, :, count:-1].isnan().all(), "only what closed is written"


def test_entries_have_lengths_of_their_own_type() -> None:
    cache = store_of(Cells(8, 4), 16)
    cache.lengths.copy_(torch.tensor([7, 12]))
    assert cache.entry_lengths("cmp").tolist() == [0, 2]
    assert cache.entry_lengths("cmp").dtype == torch.int32


@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("added", [1, 4, 9])
def test_sequences_of_different_lengths(added: int, page: int | None) -> None:
    """The second sequence starts over in the middle."""
    cells = Cells(8, 4)
    cache = store_of(cells, page)
    k, v = tokens_of(36)
    for first in range(0, 18, added):
        cache.close("cmp", "kv", append(cache, k, v, slice(first, first + added)), *MEAN)
    middle = int(cache.lengths[0])
    cache.reset([1])
    for first in range(middle, 36 - added + 1, added):
        cache.close("cmp", "kv", append(cache, k, v, slice(first, first + added)), *MEAN)
    end = int(cache.lengths[0])
    assert cache.lengths.tolist() == [end, end - middle]
    for s, first in enumerate([0, middle]):
        wanted = whole(k["kv"][s : s + 1, :, first:end], cells, POOLS["mean"].entries)[0]
        torch.testing.assert_close(cache.k["cmp"][s, :, : wanted.shape[1]], wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("own_values", [True, False])
@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("before", [0, 5])
def test_softmax_of_another_stream(before: int, page: int | None, own_values: bool) -> None:
    """Values are weighed by the values of that stream, or by its keys where it has none; here one for all dims."""
    cells, logits = Cells(8, 4, before), "full" if own_values else "narrow"
    cache = store_of(cells, page)
    k, v = tokens_of(41)
    z = v["full"] if own_values else k["narrow"]
    for first in range(0, 41, 5):
        added = append(cache, k, v, slice(first, min(first + 5, 41)))
        cache.close("cmp", "kv", added, *SOFTMAX, logits=logits)
    layout, pool = layout_of(z, z, Options()), POOLS["softmax"].entries
    wanted_k = whole(k["kv"], cells, lambda c, there: pool(c, there, cells_of(k[logits], cells, layout)))
    wanted_v = whole(v["kv"], cells, lambda c, there: pool(c, there, cells_of(z, cells, layout)))
    for found, wanted in ((cache.k["cmp"], wanted_k), (cache.v["cmp"], wanted_v)):
        torch.testing.assert_close(found[:, :, : entry_count(41, cells)], wanted, rtol=0, atol=1e-12)


def test_keys_alone() -> None:
    cells = Cells(8, 4)
    cache = store_of(cells, 16)
    k, v = tokens_of(41)
    cache.close("keys", "bare", append(cache, k, v, slice(0, 41)), *MEAN._replace(of_v=None))
    assert "keys" not in cache.v
    torch.testing.assert_close(
        cache.k["keys"][:, :, :9], whole(k["bare"], cells, POOLS["mean"].entries), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("step", [1, 4, 15])
def test_overflow_keeps_the_entries_of_what_fits(step: int, page: int | None) -> None:
    """The first sequence runs full, also in the middle of an append; the second one, reset, does not."""
    cells = Cells(8, 4)
    cache = store_of(cells, page)
    k, v = tokens_of(CAPACITY + 15)
    for first in range(0, CAPACITY + 15, step):
        if first == 30:
            cache.reset([1])
        cache.at_least = 0  # as if the host knew of no length
        cache.close("cmp", "kv", append(cache, k, v, slice(first, first + step)), *MEAN)
    assert cache.lengths[0] == CAPACITY
    assert cache.dropped[0] > 0
    wanted = whole(k["kv"][:1, :, :CAPACITY], cells, POOLS["mean"].entries)
    assert cache.entry_lengths("cmp")[0] == wanted.shape[2] == entry_count(CAPACITY, cells)
    torch.testing.assert_close(cache.k["cmp"][:1, :, :-1], wanted, rtol=0, atol=1e-12)


def test_missing_pages_hold_no_entries() -> None:
    """The second sequence has one page of three, in any order."""
    cells = Cells(8, 4)
    cache = store_of(cells, 16, torch.tensor([[4, 0, 2], [1, -1, -1]], dtype=torch.int32))
    k, v = tokens_of(41)
    for first in range(0, 41, 6):
        added = append(cache, k, v, slice(first, min(first + 6, 41)))
        cache.close("cmp", "kv", added, *MEAN)
    assert cache.entry_lengths("cmp").tolist() == [9, 3]
    wanted = whole(k["kv"], cells, POOLS["mean"].entries)
    torch.testing.assert_close(cache.k["cmp"][0, :, :9], wanted[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(cache.k["cmp"][1, :, :3], wanted[1, :, :3], rtol=0, atol=1e-12)
    assert cache.k["cmp"][1, :, 3:-1].isnan().all()


@pytest.mark.parametrize("page", [None, 16])
def test_no_length_is_read_on_the_host(page: int | None) -> None:
    cache = store_of(Cells(8, 4), page)
    k, v = tokens_of(20)
    with NoSync():
        for first in range(0, 20, 5):
            added = append(cache, k, v, slice(first, first + 5))
            cache.close("cmp", "kv", added, *SOFTMAX, logits="full")
    with pytest.raises(AssertionError, match="waits for the device"), NoSync():
        assert cache.lengths[0] == 20


def test_a_capacity_below_one_cell() -> None:
    cache = store_of(Cells(8, 4), None, capacity=7)
    k, v = tokens_of(7)
    cache.close("cmp", "kv", append(cache, k, v, slice(0, 7)), *MEAN)
    assert cache.entry_lengths("cmp").tolist() == [0, 0]
    assert cache.k["cmp"].shape[2] == 1


@pytest.mark.parametrize("page", [None, 16])
def test_rows_at_positions_of_each_sequence(page: int | None) -> None:
    cache = store_of(Cells(8, 4), page)
    k, v = tokens_of(CAPACITY)
    append(cache, k, v, slice(0, CAPACITY))
    positions = torch.tensor([[0, 17, 44], [31, 31, 5]])
    found = cache.rows_at(cache.k["kv"], positions)
    for s in range(BATCH):
        assert torch.equal(found[s], k["kv"][s, :, positions[s]])
    clamped = cache.rows_at(cache.v["kv"], torch.tensor([[-3, 99], [-1, 45]]))
    assert torch.equal(clamped, v["kv"][:, :, [0, CAPACITY - 1]])


def test_bad_entries_are_refused() -> None:
    with pytest.raises(ValueError, match="positive heads, dims and cells"):
        store_of(Cells(8, 0), None)
    with pytest.raises(ValueError, match="cells that reach their place"):
        store_of(Cells(8, 4, before=8), None)
    shape, entry = StreamShape(HEADS, QK, V), EntryShape(HEADS, QK, V, Cells(8, 4))
    with pytest.raises(ValueError, match="a name that no stream has"):
        CacheStore(
            BATCH, 8, {"kv": shape}, {}, {"kv": entry}, page=None, device="cpu", dtype=torch.float32, page_table=None
        )
