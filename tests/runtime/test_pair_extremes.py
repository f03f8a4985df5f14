"""The least and greatest number of each tile of pairs, read a piece at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spdsl.runtime.call import lists
from spdsl.runtime.call.lists import Tiles, pair_extremes, read, row_shift, tiles_of
from spdsl.runtime.sequences import Layout


def tiles(rows: list[int], keys: list[int], block_m: int = 16, block_n: int = 16) -> Tiles:
    """Of sequences whose last row stands at their last key."""
    count, of_keys = torch.tensor(rows), torch.tensor(keys)
    sizes = (-(-max(rows) // block_m), block_m, -(-max(keys) // block_n), block_n)
    return tiles_of(of_keys - count, count, torch.zeros_like(of_keys), of_keys, sizes)


@pytest.mark.parametrize("piece", [1, 1000, 1 << 22])
@pytest.mark.parametrize("heads", [1, 3])
def test_bounds_of_packed_rows(heads: int, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is read at once: never more than a piece, or one tile of each sequence and head."""
    monkeypatch.setattr(lists, "_PIECE", piece)
    rows, keys, width = [37, 1, 0, 20], [37, 9, 0, 44], 40
    x = torch.randint(-9, 9, (1, heads, sum(rows), width)).float()
    x[0, :, 3, 5] = torch.nan
    starts = [0, 37, 38, 38]
    spans = [torch.tensor(list(zip(first, count, strict=True))) for first, count in ((starts, rows), ([0] * 4, keys))]
    shift = row_shift(x, Layout(spans[0], spans[1], None, None, 37, 44))
    head, largest = torch.arange(heads).view(1, -1, 1, 1), [0]

    def values(q: Tensor, k: Tensor) -> Tensor:
        largest.append(q.numel() * k.shape[3] * heads)
        return read(x, head, q + shift, k)

    own = tiles(rows, keys)
    low, high = pair_extremes(own, values)
    assert low.shape == high.shape == (4, heads, 3, 3)
    assert max(largest) <= max(piece, 4 * heads * 16 * 16)
    for s, (start, count, tokens) in enumerate(zip(starts, rows, keys, strict=True)):
        whole = torch.nn.functional.pad(x[0, :, start : start + count], (0, 8))[..., :tokens]
        for i, j in own.inside[s, 0].nonzero().tolist():
            tile = whole[:, 16 * i : 16 * (i + 1), 16 * j : 16 * (j + 1)].flatten(1)
            torch.testing.assert_close(low[s, :, i, j], tile.amin(1), equal_nan=True)
            torch.testing.assert_close(high[s, :, i, j], tile.amax(1), equal_nan=True)


def test_rows_of_a_part() -> None:
    """Positions of one call as rows of it."""
    x = torch.zeros(2, 1, 7, 3)
    assert row_shift(x, Layout(None, None, None, None, 7, 11)) == 7 - 11
    assert row_shift(x, Layout(None, None, 30, 0, 7, 11)) == -30
