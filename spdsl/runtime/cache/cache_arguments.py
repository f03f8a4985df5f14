"""Checking the arguments of a cache: its sizes, its page table, and the rows that it empties."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from spdsl.runtime.sequences import INT32_MOST, expect, expect_dtype, expect_number, expect_tensor

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


def expect_cache(cache: object, kind: type) -> None:
    """A cache of this module: that of another one keeps other streams."""
    if not isinstance(cache, kind):
        got = type(cache).__name__ if type(cache).__name__ != kind.__name__ else f"that of {type(cache).__module__}"
        raise TypeError(f"cache: expected a {kind.__name__} of {kind.__module__}, got {got}")


def check_page_table(table: Tensor, batch: int, width: int) -> None:
    """int32 [batch, width]: each page once, -1 where none is handed out."""
    expect_tensor("page_table", table)
    expect(not table.is_meta, "page_table", "a tensor with numbers", table.device)
    expect(table.dtype == torch.int32, "page_table", "int32", table.dtype)
    expect(list(table.shape) == [batch, width], "page_table", f"[{batch}, {width}]", list(table.shape))
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
