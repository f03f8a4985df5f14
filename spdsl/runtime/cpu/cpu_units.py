"""Attention of queries to the units of keys that each of them chose, on CPU tensors, in time that follows the pairs.

Keys are outermost: the queries that chose a unit meet it in dense products. Rows are taken in blocks; in a block the
pairs (row, chosen unit) are sorted by unit and cut into tiles of equal size, so that one batched product serves many
units. Each pair has a place of its own in the results of the tiles, and the row gathers its pairs from there in the
order of its list: nothing is added twice at once, and every sum has one order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spdsl.runtime.cpu.cpu_engines import seen_product
from spdsl.runtime.cpu.cpu_threads import in_order
from spdsl.runtime.cpu.cpu_tiles import Logits
from spdsl.runtime.cpu.cpu_unit_tiles import (
    UnitTest,
    UnitTests,
    heads_by_row,
    hide,
    keys_by_unit,
    keys_in_order,
    pair_chunks,
    pair_rows,
    pair_tiles,
    rows_by_list,
    unit_blocks,
    unit_sizes,
)


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
    sizes, tests = unit_sizes(q, k, chosen, unit, form), UnitTests(visible, bias)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q_rows = rows_by_list(q.to(dtype) * form.scale, sizes)
    k_units, v_units = (keys_by_unit(x, sizes, dtype) for x in (k, v))
    product = torch.matmul if _finite(q, k, v) else seen_product
    out = q_rows.new_zeros(len(q_rows), sizes.group, v.shape[3])
    lse = q_rows.new_full((len(q_rows), sizes.group), -torch.inf)
    sinks = (
        None if sink is None else rows_by_list(sink.detach().to(dtype).view(1, -1, 1, 1).expand(*q.shape[:3], 1), sizes)
    )
    blocks = unit_blocks(chosen, sizes, v.shape[3])

    def run(number: int) -> None:
        block = blocks[number]
        tiles, place = pair_tiles(chosen.flatten(0, 2)[block].long(), block.start, sizes)
        pairs = tiles.row.numel()
        results = out.new_empty(pairs + 1, sizes.group, v.shape[3])
        results[pairs] = 0.0
        highest = out.new_full((pairs + 1, sizes.group), -torch.inf)
        sums = torch.zeros_like(highest)
        for x in pair_chunks(tiles, q_rows, k_units, tests, form, sizes):
            top = x.logits.amax(-1, keepdim=True)
            p = x.logits.sub_(top.masked_fill(top == -torch.inf, 0.0)).exp_()
            results[x.place] = product(p, v_units[x.table]).view(-1, *results.shape[1:])
            highest[x.place], sums[x.place] = top.view(-1, sizes.group), p.sum(-1).view(-1, sizes.group)
        total = (highest + sums.log())[place].logsumexp(1)
        lse[block] = total = total if sinks is None else torch.logaddexp(total, sinks[block].squeeze(-1))
        shares = torch.exp(highest[place] - total.masked_fill(total == -torch.inf, torch.inf).unsqueeze(1))
        _gather_pairs(out[block], results, place, shares)

    in_order(len(blocks), run, lambda _: None)
    return heads_by_row(out, sizes).to(q.dtype), heads_by_row(lse.unsqueeze(-1), sizes).squeeze(-1)


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
    sizes, tests = unit_sizes(q, k, chosen, unit, form), UnitTests(visible, bias)
    dtype = lse.dtype
    q_rows = rows_by_list(q.to(dtype) * form.scale, sizes)
    k_units, v_units = (keys_by_unit(x, sizes, dtype) for x in (k, v))
    delta = (dout.to(dtype) * out.to(dtype)).sum(-1) - (0.0 if dlse is None else dlse.to(dtype))
    row_lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # an empty row then has exp(logit - lse) = 0
    finite = _finite(q, k, v, dout, delta, lse.masked_fill(lse == -torch.inf, 0.0))
    product = torch.matmul if finite else seen_product
    saved = [rows_by_list(x, sizes) for x in (dout.to(dtype), row_lse.unsqueeze(-1), delta.unsqueeze(-1))]
    dq, dk, dv = torch.zeros_like(q_rows), torch.zeros_like(k_units), torch.zeros_like(v_units)
    blocks = unit_blocks(chosen, sizes, q.shape[3])

    def run(number: int) -> tuple[Tensor, Tensor, Tensor]:
        block = blocks[number]
        tiles, place = pair_tiles(chosen.flatten(0, 2)[block].long(), block.start, sizes)
        pairs = tiles.row.numel()
        results = dq.new_empty(pairs + 1, *dq.shape[1:])
        results[pairs] = 0.0
        table, own = torch.unique_consecutive(tiles.table, return_inverse=True)  # tiles are sorted by unit
        own_dk, own_dv = (torch.zeros(len(table), *x.shape[1:], dtype=dtype) for x in (dk, dv))
        for x in pair_chunks(tiles, q_rows, k_units, tests, form, sizes):
            do, lse_of, delta_of = (pair_rows(rows, x.rows) for rows in saved)
            p = x.logits.sub_(lse_of).exp_()
            ds = (do @ v_units[x.table].transpose(1, 2)).sub_(delta_of).mul_(p if finite else hide(p, x.hidden, 0.0))
            ds = ds if x.slope is None else ds.mul_(x.slope)
            ds = ds if finite else hide(ds, x.hidden, 0.0)  # else 0 already
            results[x.place] = product(ds, x.k).view(-1, *results.shape[1:])
            own_dk.index_add_(0, own[x.tiles], product(ds.transpose(1, 2), x.q))
            own_dv.index_add_(0, own[x.tiles], product(p.transpose(1, 2), do))
        _gather_pairs(dq[block], results, place, None)
        return table, own_dk, own_dv

    def take(found: tuple[Tensor, Tensor, Tensor]) -> None:
        dk.index_add_(0, found[0], found[1])
        dv.index_add_(0, found[0], found[2])

    in_order(len(blocks), run, take)
    dq = heads_by_row(dq, sizes) * form.scale
    return dq.to(q.dtype), keys_in_order(dk, sizes).to(k.dtype), keys_in_order(dv, sizes).to(v.dtype)


def _finite(*inputs: Tensor) -> bool:
    """False means that plain products would carry NaN to what a weight of 0 hides."""
    return all(bool(x.sum().isfinite()) for x in inputs)


def _gather_pairs(rows: Tensor, results: Tensor, place: Tensor, shares: Tensor | None) -> None:
    """rows [.., G, D] += the results of their pairs, times their shares [.., n, G], in the order of the lists."""
    for slot in range(place.shape[1]):
        found = results.index_select(0, place[:, slot])
        rows += found if shares is None else found.mul_(shares[:, slot].unsqueeze(-1))
