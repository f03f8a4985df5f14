"""The gradient of what a bias reads on CPU tensors: the gradients of the logits of each tile, summed by element.

Tiles are those of the backward, so time and memory follow what is visited; sums are added in the order of the tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spdsl.runtime.cpu.cpu_engines import logit_gradients
from spdsl.runtime.cpu.cpu_threads import in_order
from spdsl.runtime.cpu.cpu_tiles import Logits, Part, TileCall, fold_rows, row_pieces, tile_calls, tile_data
from spdsl.runtime.cpu.cpu_unit_tiles import (
    UnitTests,
    hide,
    keys_by_unit,
    on_pairs_of,
    pair_chunks,
    pair_rows,
    pair_tiles,
    part_of_tiles,
    rows_by_list,
    unit_blocks,
    unit_sizes,
)

OfPairs = Callable[..., "Tensor | float"]
Add = Callable[[Tensor, Tensor], None]
"""Adds sums to the elements of those numbers."""


class ReadOnPairs(NamedTuple):
    """A read of a bias on positions of queries and keys, for units on heads, too: the derivative, and its number."""

    slope: OfPairs
    number: OfPairs


class _Sums(NamedTuple):
    read: int
    number: Tensor
    sums: Tensor


def sparse_bias_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    parts: Sequence[Part],
    reads: Sequence[ReadOnPairs],
    out: Tensor,
    lse: Tensor,
    form: Logits,
    add: Sequence[Add],
) -> None:
    """Hands to `add` of each read what the rows of q have for its elements; arguments as of `sparse_backward`."""
    spans = row_pieces(q, parts)

    def run(number: int) -> list[_Sums]:
        found = list[_Sums]()
        for part in parts:
            for call in tile_calls(q, part, *spans[number]):
                ds = _of_tiles(dout, dlse, q, part, call, out, lse, form)
                for tile, (q_at, k_at) in enumerate(_positions(call, form.q_origin)):
                    for i, read in enumerate(reads):
                        found.append(_Sums(i, *by_number(read.number(q_at, k_at), ds[tile] * read.slope(q_at, k_at))))
        return found

    in_order(len(spans), run, lambda found: _hand(found, add))


def _of_tiles(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    part: Part,
    call: TileCall,
    out: Tensor,
    lse: Tensor,
    form: Logits,
) -> Tensor:
    """The gradients of the logits of a call: [tiles, B, Hq, rows, keys]."""
    tile, heads = tile_data(q, part, call, form), part.k.shape[1]
    do, o = (fold_rows(x, call, heads).to(lse.dtype) for x in (dout, out))
    s = fold_rows(lse.unsqueeze(-1), call, heads)
    s = s.masked_fill(s == -torch.inf, torch.inf)  # an empty row then has exp(logit - lse) = 0
    ds = torch.zeros_like(s) if dlse is None else fold_rows(dlse.unsqueeze(-1), call, heads).to(lse.dtype)
    found = logit_gradients(tile, do, o, s, ds)
    by_row: Tensor = found.unflatten(0, (len(call.ranges), q.shape[0])).unflatten(3, (-1, call.rows))
    return by_row.flatten(2, 3)


def _positions(call: TileCall, q_origin: int) -> Iterator[tuple[Tensor, Tensor]]:
    for tile, ranges in enumerate(call.ranges):
        first = q_origin + call.first + tile * call.rows
        keys = torch.cat([torch.arange(*span) for span in ranges])
        yield torch.arange(first, first + call.rows).unsqueeze(1), keys.unsqueeze(0)


def by_number(number: Tensor | float, x: Tensor) -> tuple[Tensor, Tensor]:
    """x, summed over the axes along which its elements have one number; and with more sums than numbers, by number."""
    assert isinstance(number, Tensor)
    number = number.view(*[1] * (x.dim() - number.dim()), *number.shape)
    same = [axis for axis in range(x.dim()) if number.shape[axis] == 1 and x.shape[axis] > 1]
    x = x.sum(same, keepdim=True) if same else x
    number, x = number.expand_as(x).flatten(), x.flatten()
    if not x.numel():
        return number, x
    least, greatest = (int(end) for end in torch.aminmax(number))
    if greatest - least >= x.numel():
        return number, x
    sums = x.new_zeros(greatest - least + 1).index_put_((number.long() - least,), x, accumulate=True)
    return torch.arange(least, greatest + 1), sums


def _hand(found: Sequence[_Sums], add: Sequence[Add]) -> None:
    for sums in found:
        add[sums.read](sums.sums, sums.number)


def units_bias_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    chosen: Tensor,
    unit: int,
    tests: UnitTests,
    reads: Sequence[ReadOnPairs],
    form: Logits,
    add: Sequence[Add],
) -> None:
    """The same over the units of a choice; arguments as of `units_backward`."""
    sizes, dtype = unit_sizes(q, k, chosen, unit, form), lse.dtype
    q_rows = rows_by_list(q.to(dtype) * form.scale, sizes)
    k_units, v_units = (keys_by_unit(x, sizes, dtype) for x in (k, v))
    delta = (dout.to(dtype) * out.to(dtype)).sum(-1) - (0.0 if dlse is None else dlse.to(dtype))
    row_lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    saved = [rows_by_list(x, sizes) for x in (dout.to(dtype), row_lse.unsqueeze(-1), delta.unsqueeze(-1))]
    blocks = unit_blocks(chosen, sizes, q.shape[3])

    def run(number: int) -> list[_Sums]:
        block, found = blocks[number], list[_Sums]()
        tiles, _ = pair_tiles(chosen.flatten(0, 2)[block].long(), block.start, sizes)
        for x in pair_chunks(tiles, q_rows, k_units, tests, form, sizes):
            do, lse_of, delta_of = (pair_rows(rows, x.rows) for rows in saved)
            p = hide(x.logits.sub_(lse_of).exp_(), x.hidden, 0.0)
            ds = hide((do @ v_units[x.table].transpose(1, 2)).sub_(delta_of).mul_(p), x.hidden, 0.0)
            ds = ds.view(*x.rows.shape, sizes.group, sizes.unit)
            on_pairs = on_pairs_of(part_of_tiles(tiles, x.tiles), sizes)
            for i, read in enumerate(reads):
                slope = read.slope(*on_pairs.places)
                slope = on_pairs.by_tile(slope) if isinstance(slope, Tensor) else slope
                of_read = read.number(*on_pairs.places)
                assert isinstance(of_read, Tensor)
                found.append(_Sums(i, *by_number(on_pairs.by_tile(of_read), ds * slope)))
        return found

    in_order(len(blocks), run, lambda found: _hand(found, add))
