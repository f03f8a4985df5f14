"""Appending by kernels: what the torch path stores, and nothing where neither may write."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spdsl import targets
from spdsl.machine.crosscompile import compile_launch
from spdsl.machine.launches import Launch, specialise
from spdsl.runtime.cache import append_kernel, storage
from spdsl.runtime.cache.cache import CacheStore, StreamShape
from spdsl.runtime.cache.states import State
from spdsl.runtime.cache.storage import NewTokens

BATCH, HEADS, CAPACITY = 3, 2, 72
STARTS = [0, 13, 50]
# Pages of 16 in any order, up to 17 of them; the second sequence has a hole, the third one ends early.
TABLE = torch.tensor([[9, 3, 0, 16, 7], [5, 1, -1, 12, 2], [4, 11, 8, 15, -1]], dtype=torch.int32)
# Numbers of each token: one, one, and 9 rows, more than there are heads, of more columns than are copied at once.
WIDE = (("9", 9), ("5", 5), ("14", 14))
TENSORS = [
    State("tokens.place", "row", (), 0, torch.int64, "append"),
    State("tokens.mark", "row", (), 0, torch.uint8, "append"),
    State("tokens.wide", "row", WIDE, 1, torch.float32, "append"),
]


def store_of(page: int | None, dtype: torch.dtype, qk: int = 24, v: int = 80) -> CacheStore:
    """A cache whose memory is full of NaN, with sequences of different lengths."""
    streams = {"kv": StreamShape(HEADS, qk, v), "bare": StreamShape(1, v, 0), "odd": StreamShape(3, 5, 7)}
    found = CacheStore(
        BATCH,
        CAPACITY,
        streams,
        TENSORS,
        page=page,
        device="cpu",
        dtype=dtype,
        page_table=None if page is None else TABLE,
    )
    for store in [*found.k.values(), *found.v.values()]:
        store.fill_(torch.nan)
    for tokens in found.tokens.values():
        tokens.fill_(99)
    found.lengths.copy_(torch.tensor(STARTS))
    return found


def tokens_of(count: int, dtype: torch.dtype, qk: int = 24, v: int = 80) -> tuple[dict[str, Tensor], ...]:
    """Tokens before heads, and vectors that are not contiguous."""
    torch.manual_seed(count)

    def vectors(heads: int, dim: int) -> Tensor:
        return torch.randn(BATCH, count, heads, dim, dtype=torch.float64).to(dtype).transpose(1, 2)

    apart = torch.randn(BATCH, HEADS, v, count, dtype=torch.float64).to(dtype).transpose(2, 3)
    place = torch.arange(BATCH * count).view(count, BATCH).T
    k, values = (
        {"kv": vectors(HEADS, qk), "bare": vectors(1, v), "odd": vectors(3, 5)},
        {"kv": apart, "odd": vectors(3, 7)},
    )
    wide = torch.randn(BATCH, 9, 5, 14, count).movedim(4, 2)
    return k, values, {"place": place, "mark": place % 3 == 0, "wide": wide}


def both(added: int, page: int | None, dtype: torch.dtype) -> tuple[CacheStore, CacheStore]:
    """The same tokens by kernels and by torch."""
    found, wanted = store_of(page, dtype), store_of(page, dtype)
    found._add_by_kernels(*tokens_of(added, dtype), NewTokens(added))
    wanted._add_by_torch(*tokens_of(added, dtype), NewTokens(added))
    return found, wanted


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("added", [0, 1, 5, 40])
def test_kernels_store_what_torch_stores(added: int, page: int | None, dtype: torch.dtype) -> None:
    """Every place but the spare one, which torch alone writes, has the same bits or is NaN in both."""
    found, wanted = both(added, page, dtype)
    assert torch.equal(found.lengths, wanted.lengths)
    assert torch.equal(found.dropped, wanted.dropped)
    assert not found.spans[:, 0].any()
    for name, other in [*wanted.k.items(), *((f"{name} v", x) for name, x in wanted.v.items())]:
        own = found.v[name.removesuffix(" v")] if name.endswith(" v") else found.k[name]
        if page is None:
            assert own[:, :, -1].isnan().all(), "the spare place is free"
            own, other = own[:, :, :-1], other[:, :, :-1]
        else:
            assert own[-1].isnan().all(), "the spare home is free"
            own, other = own[:-1], other[:-1]
        torch.testing.assert_close(own, other, rtol=0, atol=0, equal_nan=True)
    for name, tokens in wanted.tokens.items():
        axis = found.token_axes[name]
        assert torch.equal(found.tokens[name].narrow(axis, 0, CAPACITY), tokens.narrow(axis, 0, CAPACITY))
        assert (found.tokens[name].select(axis, CAPACITY) == 99).all()


@pytest.mark.interpret
def test_lengths_stop_at_the_first_hole_and_at_the_capacity() -> None:
    paged, _ = both(40, 16, torch.float32)
    assert paged.lengths.tolist() == [40, 32, 64]  # holes begin at 32 and at 64
    assert paged.dropped.tolist() == [0, 40 - 19, 40 - 14]
    whole, _ = both(40, None, torch.float32)
    assert whole.lengths.tolist() == [40, 53, CAPACITY]
    assert whole.dropped.tolist() == [0, 0, 40 - 22]


@pytest.mark.interpret
def test_a_table_of_many_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hole lies beyond the entries that are looked at at once."""
    monkeypatch.setattr(append_kernel, "_TABLE_ENTRIES", 2)
    table = torch.arange(10, dtype=torch.int32).view(1, 10)
    for hole in (0, 1, 2, 3, 7, 9):
        holed = table.clone()
        holed[0, hole] = -1
        found = CacheStore(
            1, 160, {"kv": StreamShape(1, 1, 0)}, {}, page=16, device="cpu", dtype=torch.float32, page_table=holed
        )
        found._add_by_kernels({"kv": torch.ones(1, 1, 160, 1)}, {}, {}, NewTokens(160))
        assert (found.lengths.item(), found.dropped.item()) == (16 * hole, 160 - 16 * hole)


@pytest.mark.interpret
def test_a_table_whose_rows_lie_apart() -> None:
    """A transposed table means the same pages."""
    found = CacheStore(
        3, CAPACITY, {"kv": StreamShape(1, 4, 0)}, {}, page=16, device="cpu", dtype=torch.float32,
        page_table=TABLE.T.contiguous().T,
    )  # fmt: skip
    new = torch.randn(3, 1, 20, 4)
    found._add_by_kernels({"kv": new}, {}, {}, NewTokens(20))
    assert torch.equal(found.rows(found.k["kv"], 1, 20), new[1:2])


def test_cpu_tensors_take_the_torch_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless kernels are interpreted: then nothing but kernels runs."""
    started: list[str] = []
    monkeypatch.setattr(append_kernel, "launch", lambda kernel, *_, **__: started.append(kernel.fn.__name__))
    for interpreted in (False, True):
        monkeypatch.setattr(storage, "uses_kernels", lambda _, uses=interpreted: uses)
        store_of(16, torch.float32).append_tokens(*tokens_of(5, torch.float32))
        assert started == ["append_rows", "append_lengths"] * interpreted


def launches_of(monkeypatch: pytest.MonkeyPatch, added: int, page: int | None, dtype: torch.dtype) -> list[Launch]:
    """What an append of three streams and one token tensor launches, without running it."""
    found: list[Launch] = []

    def note(kernel: Any, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
        assert min(grid) > 0
        found.append(specialise(kernel, args, named))

    monkeypatch.setattr(append_kernel, "launch", note)
    k, v, tokens = tokens_of(added, dtype, 192, 128)
    store_of(page, dtype, 192, 128)._add_by_kernels(k, v, {"mark": tokens["mark"]}, NewTokens(added))
    return found


@pytest.mark.crosscompile
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("added, page", [(1, 16), pytest.param(40, 16, marks=pytest.mark.full), (40, None)])
def test_kernels_compile(added: int, page: int | None, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = launches_of(monkeypatch, added, page, torch.bfloat16)
    assert [launch.name for launch in launches] == ["append_rows", "append_lengths"]
    for launch in launches:
        compiled = compile_launch(launch, targets.find(target))
        assert compiled.error is None
        assert compiled.fits
        assert compiled.spills == 0
