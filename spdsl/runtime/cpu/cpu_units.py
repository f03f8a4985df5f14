"""Attention of queries to the units of keys that each of them chose, on CPU tensors, in time that follows the pairs.

Keys are outermost: the queries that chose a unit meet it in dense products. Rows are taken in blocks; in a block the
pairs (row, chosen unit) are sorted by unit and cut into tiles of equal size, so that one batched product serves many
units. Each pair has a place of its own in the results of the tiles, and the row gathers its pairs from there in the
order of its list: nothing is added twice at once, and every sum has one order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from spdsl.runtime.cpu.cpu import Logits, _seen_product
from spdsl.runtime.cpu.cpu_threads import in_order

# Query positions [rows, 1], key indices [rows, keys], query heads [G, rows, 1] -> bool, or numbers, broadcastable to
# [G, rows, keys], or to [B, G, rows, keys] where it differs by batch row.
UnitTest = Callable[[Tensor, Tensor, Tensor], Tensor]

_UNIT_RESULTS = 1 << 22  # numbers of a block's results in tile order: 16 MB in fp32
_UNIT_LOGITS = 1 << 19  # logits of one batched product, of which a few copies live in the cache: 2 MB in fp32
_UNIT_TILE = 256  # rows of a product at most, the heads of a list included


class _UnitSizes(NamedTuple):
    batch: int
    lists: int  # heads of lists
    group: int  # query heads of a list
    rows: int
    kv_heads: int
    keys: int
    unit: int
    units: int  # of a sequence
    q_origin: int


class _UnitTests(NamedTuple):
    visible: UnitTest
    bias: UnitTest | None


class _UnitTiles(NamedTuple):
    """The pairs of a block of rows, by unit. A row is a number in [B, Hc, N], a table unit one in [B, Hk, units]."""

    row: Tensor  # [tiles, pairs]
    hidden: Tensor  # [tiles, pairs]: fills a tile up, no pair
    head: Tensor  # [tiles] head of lists
    unit: Tensor  # [tiles] unit of its sequence
    table: Tensor  # [tiles] table unit


class _UnitChunk(NamedTuple):
    """Some tiles of a block and the inputs of their products; P = pairs * group."""

    tiles: slice  # of the block
    place: slice  # of its pairs among those of the block
    rows: Tensor  # [tiles, pairs]
    table: Tensor  # [tiles]
    logits: Tensor  # [tiles, P, unit], -inf where hidden
    slope: Tensor | None  # of the cap
    hidden: Tensor  # [tiles, pairs, 1 or G, unit]
    q: Tensor  # [tiles, P, Dqk], scaled
    k: Tensor  # [tiles, unit, Dqk]


def units_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    unit: int,
    visible: UnitTest,
    bias: UnitTest | None,
    form: Logits,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of q [B, Hq, N, Dqk] -> output [B, Hq, N, Dv] in q's dtype, natural-log lse [B, Hq, N].

    k and v are [B, Hk, M, D]; chosen int32 [B, Hc, N, n] holds distinct units, -1 for none, unit u being the keys
    [u * unit, (u + 1) * unit). Query head h reads list h // (Hq // Hc) and kv head h // (Hq // Hk). The lse is fp32
    (fp64 for fp64 inputs). `sink` [Hq] is a logit that enters the denominator only. An empty row gives 0 and -inf.
    """
    sizes, tests = _unit_sizes(q, k, chosen, unit, form), _UnitTests(visible, bias)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q_rows = _rows_of(q.to(dtype) * form.scale, sizes)
    k_units, v_units = (_units_of(x, sizes, dtype) for x in (k, v))
    product = torch.matmul if _finite(q, k, v) else _seen_product
    out = q_rows.new_zeros(len(q_rows), sizes.group, v.shape[3])
    lse = q_rows.new_full((len(q_rows), sizes.group), -torch.inf)
    sinks = None if sink is None else _rows_of(sink.detach().to(dtype).view(1, -1, 1, 1).expand(*q.shape[:3], 1), sizes)
    blocks = _unit_blocks(chosen, sizes, v.shape[3])

    def run(number: int) -> None:
        block = blocks[number]
        tiles, place = _unit_tiles(chosen.flatten(0, 2)[block].long(), block.start, sizes)
        pairs = tiles.row.numel()
        results = out.new_empty(pairs + 1, sizes.group, v.shape[3])
        results[pairs] = 0.0
        highest = out.new_full((pairs + 1, sizes.group), -torch.inf)
        sums = torch.zeros_like(highest)
        for x in _unit_chunks(tiles, q_rows, k_units, tests, form, sizes):
            top = x.logits.amax(-1, keepdim=True)
            p = x.logits.sub_(top.masked_fill(top == -torch.inf, 0.0)).exp_()
            results[x.place] = product(p, v_units[x.table]).view(-1, *results.shape[1:])
            highest[x.place], sums[x.place] = top.view(-1, sizes.group), p.sum(-1).view(-1, sizes.group)
        total = (highest + sums.log())[place].logsumexp(1)
        lse[block] = total = total if sinks is None else torch.logaddexp(total, sinks[block].squeeze(-1))
        shares = torch.exp(highest[place] - total.masked_fill(total == -torch.inf, torch.inf).unsqueeze(1))
        _gather_pairs(out[block], results, place, shares)

    in_order(len(blocks), run, lambda _: None)
    return _heads_of(out, sizes).to(q.dtype), _heads_of(lse.unsqueeze(-1), sizes).squeeze(-1)


def units_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    chosen: Tensor,
    unit: int,
    visible: UnitTest,
    bias: UnitTest | None,
    form: Logits,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) in the dtypes of the inputs; `out` and `lse` are those of the whole softmax."""
    sizes, tests = _unit_sizes(q, k, chosen, unit, form), _UnitTests(visible, bias)
    dtype = lse.dtype
    q_rows = _rows_of(q.to(dtype) * form.scale, sizes)
    k_units, v_units = (_units_of(x, sizes, dtype) for x in (k, v))
    delta = (dout.to(dtype) * out.to(dtype)).sum(-1) - (0.0 if dlse is None else dlse.to(dtype))
    row_lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # an empty row then has exp(logit - lse) = 0
    finite = _finite(q, k, v, dout, delta, lse.masked_fill(lse == -torch.inf, 0.0))
    product = torch.matmul if finite else _seen_product
    saved = [_rows_of(x, sizes) for x in (dout.to(dtype), row_lse.unsqueeze(-1), delta.unsqueeze(-1))]
    dq, dk, dv = torch.zeros_like(q_rows), torch.zeros_like(k_units), torch.zeros_like(v_units)
    blocks = _unit_blocks(chosen, sizes, q.shape[3])

    def run(number: int) -> tuple[Tensor, Tensor, Tensor]:
        block = blocks[number]
        tiles, place = _unit_tiles(chosen.flatten(0, 2)[block].long(), block.start, sizes)
        pairs = tiles.row.numel()
        results = dq.new_empty(pairs + 1, *dq.shape[1:])
        results[pairs] = 0.0
        table, own = torch.unique_consecutive(tiles.table, return_inverse=True)  # tiles are sorted by unit
        own_dk, own_dv = (torch.zeros(len(table), *x.shape[1:], dtype=dtype) for x in (dk, dv))
        for x in _unit_chunks(tiles, q_rows, k_units, tests, form, sizes):
            do, lse_of, delta_of = (_tile_rows(rows, x.rows) for rows in saved)
            p = x.logits.sub_(lse_of).exp_()
            ds = (do @ v_units[x.table].transpose(1, 2)).sub_(delta_of).mul_(p if finite else _hide(p, x.hidden, 0.0))
            ds = ds if x.slope is None else ds.mul_(x.slope)
            ds = ds if finite else _hide(ds, x.hidden, 0.0)  # else 0 already
            results[x.place] = product(ds, x.k).view(-1, *results.shape[1:])
            own_dk.index_add_(0, own[x.tiles], product(ds.transpose(1, 2), x.q))
            own_dv.index_add_(0, own[x.tiles], product(p.transpose(1, 2), do))
        _gather_pairs(dq[block], results, place, None)
        return table, own_dk, own_dv

    def take(found: tuple[Tensor, Tensor, Tensor]) -> None:
        dk.index_add_(0, found[0], found[1])
        dv.index_add_(0, found[0], found[2])

    in_order(len(blocks), run, take)
    dq = _heads_of(dq, sizes) * form.scale
    return dq.to(q.dtype), _keys_of(dk, sizes).to(k.dtype), _keys_of(dv, sizes).to(v.dtype)


def _unit_sizes(q: Tensor, k: Tensor, chosen: Tensor, unit: int, form: Logits) -> _UnitSizes:
    lists, keys = chosen.shape[1], k.shape[2]
    unit = max(1, min(unit, keys))  # a unit that is larger has the same number and keys
    return _UnitSizes(
        q.shape[0], lists, q.shape[1] // lists, q.shape[2], k.shape[1], keys, unit, -(-keys // unit), form.q_origin
    )


def _finite(*inputs: Tensor) -> bool:
    """False means that plain products would carry NaN to what a weight of 0 hides."""
    return all(bool(x.sum().isfinite()) for x in inputs)


def _rows_of(x: Tensor, sizes: _UnitSizes) -> Tensor:
    """[B, Hq, N, D] -> [B * Hc * N, G, D]: what a list serves lies together."""
    rows: Tensor = x.unflatten(1, (sizes.lists, sizes.group)).transpose(2, 3).flatten(0, 2).contiguous()
    return rows


def _heads_of(x: Tensor, sizes: _UnitSizes) -> Tensor:
    """[B * Hc * N, G, D] -> [B, Hq, N, D]."""
    return x.view(sizes.batch, sizes.lists, sizes.rows, *x.shape[1:]).transpose(2, 3).flatten(1, 2)


def _units_of(x: Tensor, sizes: _UnitSizes, dtype: torch.dtype) -> Tensor:
    """[B, Hk, M, D] -> [B * Hk * units, unit, D], zeros past the end."""
    more = sizes.units * sizes.unit - sizes.keys
    x = torch.nn.functional.pad(x.to(dtype), (0, 0, 0, more)) if more else x.to(dtype)
    return x.reshape(-1, sizes.unit, x.shape[3])


def _keys_of(x: Tensor, sizes: _UnitSizes) -> Tensor:
    """[B * Hk * units, unit, D] -> [B, Hk, M, D]."""
    return x.view(sizes.batch, sizes.kv_heads, sizes.units * sizes.unit, x.shape[2])[:, :, : sizes.keys]


def _tile_rows(x: Tensor, rows: Tensor) -> Tensor:
    """[B * Hc * N, G, D] at rows [tiles, pairs] -> [tiles, pairs * G, D]."""
    return x.index_select(0, rows.flatten()).view(len(rows), -1, x.shape[2])


def _hide(x: Tensor, hidden: Tensor, value: float) -> Tensor:
    """x [tiles, pairs * G, unit] with `value` where hidden [tiles, pairs, 1 or G, unit], in place."""
    x.view(*hidden.shape[:2], -1, hidden.shape[3]).masked_fill_(hidden, value)
    return x


def _gather_pairs(rows: Tensor, results: Tensor, place: Tensor, shares: Tensor | None) -> None:
    """rows [.., G, D] += the results of their pairs, times their shares [.., n, G], in the order of the lists."""
    for slot in range(place.shape[1]):
        found = results.index_select(0, place[:, slot])
        rows += found if shares is None else found.mul_(shares[:, slot].unsqueeze(-1))


def _unit_blocks(chosen: Tensor, sizes: _UnitSizes, dim: int) -> list[slice]:
    """Blocks of the rows [B * Hc * N] whose results have about _UNIT_RESULTS numbers."""
    rows = chosen.shape[:3].numel()
    step = max(1, _UNIT_RESULTS // max(1, chosen.shape[3] * sizes.group * dim))
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]


def _unit_tiles(chosen: Tensor, first: int, sizes: _UnitSizes) -> tuple[_UnitTiles, Tensor]:
    """The pairs of rows `first`.. with lists [rows, n] by (batch, head of lists, unit), and the place of each."""
    real = (chosen >= 0) & (chosen < sizes.units)
    sequence = (first + torch.arange(len(chosen))).unsqueeze(1) // max(1, sizes.rows)  # [B, Hc] as one number
    key, order = torch.sort(
        (sequence * sizes.units + chosen).masked_fill(~real, torch.iinfo(torch.int64).max).flatten(), stable=True
    )
    count = int(real.sum())
    found, sharing = torch.unique_consecutive(key[:count], return_counts=True)
    pairs = _pairs_of_tile(count, len(found), sizes)
    cuts = (sharing + pairs - 1) // pairs
    segment = torch.repeat_interleave(cuts)
    end = sharing.cumsum(0)
    within = torch.arange(len(segment)) - (cuts.cumsum(0) - cuts)[segment]
    at = ((end - sharing)[segment] + within * pairs).unsqueeze(1) + torch.arange(pairs)
    hidden = at >= end[segment].unsqueeze(1)
    pair = order[at.clamp(max=max(0, count - 1))]
    place = torch.full((chosen.numel(),), pair.numel())
    place[pair[~hidden]] = torch.arange(pair.numel()).view(pair.shape)[~hidden]
    key = found[segment]
    sequence, unit = key // max(1, sizes.units), key % max(1, sizes.units)
    kv_head = sequence * sizes.kv_heads // sizes.lists  # lists are a multiple of the kv heads: [B, Hc] -> [B, Hk]
    row = first + pair // max(1, chosen.shape[1])
    tiles = _UnitTiles(row, hidden, sequence % sizes.lists, unit, kv_head * sizes.units + unit)
    return tiles, place.view(chosen.shape)


def _pairs_of_tile(count: int, units: int, sizes: _UnitSizes) -> int:
    """A power of two, at most what a unit has on average: so at least half of the places are taken."""
    most = min(_UNIT_TILE // sizes.group, _UNIT_LOGITS // (sizes.group * sizes.unit))
    pairs = min(most, count // max(1, units))
    return 1 << max(0, pairs.bit_length() - 1)


def _unit_chunks(
    tiles: _UnitTiles, q_rows: Tensor, k_units: Tensor, tests: _UnitTests, form: Logits, sizes: _UnitSizes
) -> Iterator[_UnitChunk]:
    count, pairs = tiles.row.shape
    step = max(1, _UNIT_LOGITS // (pairs * sizes.group * sizes.unit))
    for first in range(0, count, step):
        part = _UnitTiles(*(x[first : first + step] for x in tiles))
        q, k = _tile_rows(q_rows, part.row), k_units.index_select(0, part.table)
        logits, slope = q @ k.transpose(1, 2), None
        if form.softcap is not None:
            bent = logits.div_(form.softcap).tanh_()
            logits, slope = bent * form.softcap, 1 - bent * bent
        hidden, added = _unit_tests(part, tests, sizes)
        if added is not None:
            logits.view(*part.row.shape, sizes.group, sizes.unit).add_(added)
        place = slice(first * pairs, (first + len(part.row)) * pairs)
        yield _UnitChunk(
            slice(first, first + step),
            place,
            part.row,
            part.table,
            _hide(logits, hidden, -torch.inf),
            slope,
            hidden,
            q,
            k,
        )


def _unit_tests(tiles: _UnitTiles, tests: _UnitTests, sizes: _UnitSizes) -> tuple[Tensor, Tensor | None]:
    """Which logits are hidden, and what is added to them: [tiles, pairs, 1 or G, unit]."""
    n, pairs = tiles.row.shape
    rows = n * pairs
    q = (tiles.row % sizes.rows + sizes.q_origin).view(rows, 1)
    k = tiles.unit.view(n, 1, 1) * sizes.unit + torch.arange(sizes.unit)
    k = k.expand(n, pairs, -1).reshape(rows, -1)
    heads = tiles.head.view(1, n, 1) * sizes.group + torch.arange(sizes.group).view(-1, 1, 1)
    heads = heads.expand(-1, n, pairs).reshape(-1, rows, 1)
    rest = sizes.units * sizes.unit > sizes.keys
    inside = k.clamp(max=sizes.keys - 1) if rest else k

    def by_tile(x: Tensor) -> Tensor:
        x = x.broadcast_to(torch.broadcast_shapes(x.shape, (1, rows, sizes.unit)))
        if x.dim() == 4:  # each row keeps what belongs to its batch row
            batch = tiles.row.flatten() // (sizes.lists * sizes.rows)
            x = x.expand(sizes.batch, -1, -1, -1)[batch, :, torch.arange(rows)].transpose(0, 1)
        by_head: Tensor = x.unflatten(1, (n, pairs))
        return by_head.permute(1, 2, 0, 3)

    hidden = ~by_tile(tests.visible(q, inside, heads)) | tiles.hidden.view(n, pairs, 1, 1)
    if rest:
        hidden = hidden | (k >= sizes.keys).view(n, pairs, 1, -1)
    if tests.bias is None:
        return hidden, None
    added = by_tile(tests.bias(q, inside, heads))
    return hidden | (added == -torch.inf), added
