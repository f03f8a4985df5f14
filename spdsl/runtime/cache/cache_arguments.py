"""Checking the arguments of a cache: its sizes, its page table, rows and lengths of its sequences, states to import."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from spdsl.runtime.cache.ring import Ring, ring_of
from spdsl.runtime.launch.launch import uses_kernels
from spdsl.runtime.sequences import INT32_MOST, expect, expect_dtype, expect_number, expect_tensor, on_host

_SPARE_PAGES = 1024  # storage reaches to the largest page of a table: so far beyond its entries a number is a mistake


def check_cache(
    batch: int, capacity: int, page: int | None, table: Tensor | None, dtype: torch.dtype
) -> tuple[int, int, int | None]:
    """-> batch, capacity and page as Python numbers."""
    batch = expect_number("batch", batch, "a number >= 0", 0)
    capacity = expect_number("capacity", capacity, "1 to 2**31 - 1 tokens", 1)
    if page is not None:
        page = expect_number("page", page, "None or a power of two >= 16", 16)
        expect(page & (page - 1) == 0, "page", "None or a power of two >= 16", page)
    expect(page is not None or table is None, "page_table", "None, as page is None", type(table).__name__)
    expect_dtype(dtype)
    return batch, capacity, page


def expect_sizes(kv_heads: int, qk_dim: int, v_dim: int) -> None:
    """Those of streams that do not say their own: heads and dims of which there may be none are checked by stream."""
    for name, size in (("kv_heads", kv_heads), ("qk_dim", qk_dim), ("v_dim", v_dim)):
        expect_number(name, size, "a number >= 1", 1 if name == "v_dim" else 0)


def checked_ring(sink: int, window: int, spare: int, page: int | None, table: Tensor | None) -> Ring:
    """The ring for `spare` new tokens of a call."""
    spare = expect_number("ring", spare, "a number of tokens >= 1", 1)
    expect(page is not None, "page", "a number, as there is a ring", page)
    expect(table is None, "page_table", "None, as there is a ring", type(table).__name__)
    return ring_of(sink, window, spare, page or 1)


def expect_cache(cache: object, kind: type) -> None:
    """A cache of this module: that of another one keeps other streams."""
    if not isinstance(cache, kind):
        got = type(cache).__name__ if type(cache).__name__ != kind.__name__ else f"that of {type(cache).__module__}"
        raise TypeError(f"cache: expected a {kind.__name__} of {kind.__module__}, got {got}")


def check_page_table(table: Tensor, batch: int, width: int, only_shapes: bool) -> None:
    """int32 [batch, width]: each page once, -1 where none is handed out. A cache of shapes alone needs no numbers."""
    expect_tensor("page_table", table)
    expect(only_shapes or not table.is_meta, "page_table", "a tensor with numbers", table.device)
    expect(table.dtype == torch.int32, "page_table", "int32", table.dtype)
    expect(list(table.shape) == [batch, width], "page_table", f"[{batch}, {width}]", list(table.shape))
    if table.is_meta:
        return
    most = 2 * table.numel() + _SPARE_PAGES
    least, last = (int(x) for x in table.aminmax()) if table.numel() else (0, 0)
    expect(least >= -1 and last < most, "page_table", f"pages below {most}, or -1", f"{least} to {last}")
    used = table[table >= 0]
    expect(used.unique().numel() == used.numel(), "page_table", "pages that are used once", "a page used twice")


def row_index(rows: int | Sequence[int] | Sequence[bool] | Tensor, batch: int, device: torch.device) -> Tensor:
    """Row numbers as int64 [n], or a mask as bool [batch], on the device of the cache."""
    if isinstance(rows, Tensor):
        expect_tensor("rows", rows)
        expect(not rows.is_meta or device.type == "meta", "rows", f"a tensor on {device} or the host", rows.device)
    found = rows if isinstance(rows, Tensor) else _row_tensor(rows)
    expected = f"None, numbers from {-batch} to {batch - 1}, or bool [{batch}]"
    if found.dtype == torch.bool:
        expect(list(found.shape) == [batch], "rows", expected, f"bool {list(found.shape)}")
        return found.to(device)
    fits = found.dtype in (torch.int32, torch.int64) and found.dim() <= 1
    expect(fits, "rows", expected, f"{found.dtype} {list(found.shape)}")
    outside = [row for row in found.reshape(-1).tolist() if not -batch <= row < batch]
    expect(not outside, "rows", expected, outside[:8])
    return (found.reshape(-1).long() % max(1, batch)).to(device)


def length_argument(
    lengths: int | Sequence[int] | Tensor, batch: int, capacity: int, device: torch.device
) -> tuple[Tensor, int, int]:
    """-> int32 [batch] or [1] on the device, 0 to capacity; and the least and the most of them that the host knows."""
    expected = f"a number >= 0 or int [{batch}]"
    if not isinstance(lengths, Tensor):
        several = isinstance(lengths, Sequence) and not isinstance(lengths, str | bytes)
        numbers = [expect_number("lengths", x, expected, 0) for x in (lengths if several else [lengths])]  # type: ignore[union-attr]
        expect(not several or len(numbers) == batch, "lengths", expected, f"{len(numbers)} numbers")
        least, most = min(numbers, default=0), max(numbers, default=0)
        return torch.tensor(numbers, dtype=torch.int64, device=device).clamp(max=capacity).int(), least, most
    expect_tensor("lengths", lengths)
    whole = lengths.dtype in (torch.int32, torch.int64) and list(lengths.shape) == [batch]
    expect(whole, "lengths", expected, f"{lengths.dtype} {list(lengths.shape)}")
    expect(not lengths.is_meta or device.type == "meta", "lengths", f"a tensor on {device} or the host", lengths.device)
    return lengths.to(device).clamp(0, capacity).int(), 0, capacity


def held_by_ring(lengths: Tensor, first: Tensor) -> Tensor:
    """Lengths int32 [batch] or [1] to take back to, none below `first` [batch]: on the CPU those are refused."""
    if on_host(first) and not uses_kernels(first):
        expect(not (lengths < first).any(), "lengths", f"numbers from {first.tolist()} on (ring)", lengths.tolist())
    return lengths.maximum(first)


def expect_rows(rows: Sequence[int] | Tensor, batch: int, device: torch.device, once: bool = False) -> Tensor:
    """Row numbers, int64 [n] on the device, 0 to batch - 1; of a list checked, a tensor is not read on the host.

    once: no row twice.
    """
    expected = f"numbers from 0 to {batch - 1}" + (", each once" if once else "")
    if isinstance(rows, Tensor):
        expect_tensor("rows", rows)
        whole = rows.dtype in (torch.int32, torch.int64) and rows.dim() == 1
        expect(whole, "rows", f"{expected}, as int [n]", f"{rows.dtype} {list(rows.shape)}")
        expect(not rows.is_meta or device.type == "meta", "rows", f"a tensor on {device} or the host", rows.device)
        found = rows.tolist() if on_host(rows) and not uses_kernels(rows) else None
    else:
        is_list = isinstance(rows, Sequence) and not isinstance(rows, str | bytes)
        found = [expect_number("rows", row, expected) for row in (rows if is_list else [rows])]
    if found is not None:
        outside = [row for row in found if not 0 <= row < batch]
        expect(not outside, "rows", expected, outside[:8])
        expect(not once or len(set(found)) == len(found), "rows", expected, "a row twice")
    numbers = torch.tensor(found, dtype=torch.int64) if found is not None else rows.long().clamp(0, max(0, batch - 1))  # type: ignore[union-attr]
    return numbers.to(device)


def check_exported(states: object, cache: Any) -> None:
    """What `export_states` gave: every state of this cache and no other, of its shape and dtype."""
    if not isinstance(states, Mapping):
        raise TypeError(f"states: expected what export_states gave, got {type(states).__name__}")
    wanted = {"lengths": ([cache.batch], torch.int32), "dropped": ([cache.batch], torch.int32)}
    for state in cache.states:
        if state.sizes is None:  # the cache takes what comes, if it comes
            x = states.get(state.name)
            if not isinstance(x, Tensor) or x.dim() != 2 + len(state.axes):
                continue
            state = state.sized(x)
        places = cache.buffer(state).shape[2] - 1 if state.grid in cache.entries else cache.capacity
        if state.grid == "token" and cache.ring is not None:
            places = cache.ring.pages * cache.page
        wanted[state.name] = (state.shape(cache.batch, places), state.dtype)
    missing, unknown = sorted(wanted.keys() - states.keys()), sorted(map(str, states.keys() - wanted.keys()))
    expect(not missing and not unknown, "states", ", ".join(wanted), f"{missing} missing, {unknown} unknown")
    for name, (shape, dtype) in wanted.items():
        expect_tensor(name, states[name])
        got = (list(states[name].shape), states[name].dtype)
        expect(got == (shape, dtype), name, "{} of {}", f"{got[0]} of {got[1]}", shape, dtype)


def _row_tensor(rows: Any) -> Tensor:
    """Of a number or a sequence of numbers, or of bools: never of both, since a bool is a number, too."""
    is_list = isinstance(rows, Sequence) and not isinstance(rows, str | bytes)
    several: list[Any] = list(rows) if is_list else [rows]
    if is_list and several and all(isinstance(row, bool) for row in several):
        return torch.tensor(several)
    if not all(isinstance(row, Integral) and not isinstance(row, bool) for row in several):
        got = " and ".join(sorted({type(row).__name__ for row in several}))
        raise TypeError(f"rows: expected None, numbers, or a bool for each sequence, got {got}")
    numbers = [max(-INT32_MOST, min(int(row), INT32_MOST)) for row in several]  # no tensor has room for more
    return torch.tensor(numbers, dtype=torch.long)
