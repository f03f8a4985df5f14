"""One query over the keys of a cache, on CPU tensors, where they lie: a step takes each key from memory once.

A sequence lies in homes: pages, or the one row of a cache without pages. All products are of blocks of 64 keys, and
added in the order of the keys: so no bit depends on where they lie. Whole pages that are neighbours are one batched
product; scattered and small ones are gathered a few at a time, and narrow types widened, so that copies stay in the
cache of a core. One query is bound by memory: such products are as fast as the flash kernel, and faster on pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spdsl.device.cpu import Logits, Part, _seen_product, _share, _with_sink
from spdsl.device.cpu_threads import PIECES_PER_THREAD, in_order

# Keys of a piece of work: fewer take less time than a thread to start, more leave too little to share out.
_STEP_KEYS = (1024, 8192)
_GATHERED_KEYS = 512  # copied at once: 1 MB of 8 heads of 64 in fp32
_STEP_BLOCK = 64  # keys of a product


class _StepPiece(NamedTuple):
    """Neighbouring keys [first, end) of a part; full: the query sees each of them."""

    part: Part
    first: int
    end: int
    full: bool


class _Run(NamedTuple):
    """Keys of a piece in a row: slots [start, stop) of each of some neighbours, or of all `gathered` homes together."""

    homes: Sequence[int]
    start: int
    stop: int
    gathered: bool = False


def step_forward(
    q: Tensor,
    parts: Sequence[Part],
    visits: Sequence[Sequence[tuple[int, int, bool]]],
    homes: Sequence[int],
    form: Logits,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one query q [1, Hq, 1, Dqk] -> output [1, Hq, 1, Dv] in q's dtype, natural-log lse [1, Hq, 1].

    k and v of a part are whole stores [homes, Hk, page, D]: token t lies in slot t % page of home homes[t // page].
    `visits` are the key ranges (first, end, full) of each part. Else as `sparse_forward`.
    """
    pieces = list(_step_pieces(parts, visits))
    rows = q.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    found = [(rows.new_zeros(*q.shape[:3], parts[0].v.shape[3]), rows.new_full(q.shape[:3], -torch.inf))]  # of no keys
    in_order(len(pieces), lambda number: _piece_results(rows, pieces[number], homes, form), found.append)
    outs, lses = (torch.cat(x) for x in zip(*found, strict=True))
    lse = lses.logsumexp(0, keepdim=True)
    out = (outs * _share(lses, lse).unsqueeze(-1)).sum(0, keepdim=True)
    if sink is not None:
        out, lse = _with_sink(out, lse, sink.detach().to(lse.dtype).view(1, -1, 1))
    return out.to(q.dtype), lse


def step_of_units(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    unit: int,
    visible: Callable[[Tensor, Tensor, Tensor], Tensor],
    bias: Callable[[Tensor, Tensor, Tensor], Tensor] | None,
    homes: Sequence[int],
    form: Logits,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `step_forward`, over the units that each list names: chosen int32 [1, Hc, 1, n], -1 for none.

    `visible` and `bias` take query positions, key numbers and heads as in `units_forward`. Head h of q reads list
    h // (Hq // Hc).
    """
    group, length = q.shape[1] // chosen.shape[1], form.q_origin + 1
    found: list[tuple[Tensor, Tensor]] = []

    def run(number: int) -> tuple[Tensor, Tensor]:
        own = slice(number * group, (number + 1) * group)
        heads = torch.arange(own.start, own.stop).view(-1, 1, 1)
        kv_head = number * k.shape[1] // chosen.shape[1]
        part = Part(
            k[:, kv_head : kv_head + 1],
            v[:, kv_head : kv_head + 1],
            lambda first, end: [],
            lambda i, j: visible(i, j, heads),
            None if bias is None else lambda i, j: bias(i, j, heads),
        )
        firsts = [u * unit for u in chosen[0, number, 0].tolist() if 0 <= u * unit < length]
        visits = [(first, min(first + unit, length), False) for first in firsts]
        return step_forward(q[:, own], [part], [visits], homes, form, None if sink is None else sink[own])

    in_order(chosen.shape[1], run, found.append)
    return torch.cat([out for out, _ in found], 1), torch.cat([lse for _, lse in found], 1)


def _step_pieces(parts: Sequence[Part], visits: Sequence[Sequence[tuple[int, int, bool]]]) -> Iterator[_StepPiece]:
    """The visits, cut at multiples of a size that leaves every thread some pieces."""
    fewest, most = _STEP_KEYS
    keys = sum(end - first for own in visits for first, end, _ in own)
    size = fewest * max(1, -(-keys // (PIECES_PER_THREAD * torch.get_num_threads() * fewest)))
    size = min(size, most if all(part.k.element_size() >= 4 for part in parts) else fewest)
    for part, own in zip(parts, visits, strict=True):
        for first, end, full in own:
            for cut in range(first - first % size, end, size):
                yield _StepPiece(part, max(first, cut), min(end, cut + size), full)


def _piece_results(q: Tensor, piece: _StepPiece, homes: Sequence[int], form: Logits) -> tuple[Tensor, Tensor]:
    """Output [1, Hq, 1, Dv] and lse [1, Hq, 1] over the keys of a piece."""
    k, v = piece.part[:2]
    rows = q.view(k.shape[1], 1, -1, q.shape[3])  # the heads of a kv head share its keys
    runs = list(_runs(piece, homes, k.shape[2]))
    products = [_block_products(rows, _blocks_of(k, run, q.dtype), _rows_by_keys) for run in runs]
    logits = _step_logits(_in_a_row([x.movedim((0, 2), (2, 3)).flatten(2) for x in products], 2), piece, form)
    top = logits.amax(2, keepdim=True)
    weights = logits.sub_(top.masked_fill(top == -torch.inf, 0.0)).exp_()
    total, at, values = weights.sum(2, keepdim=True), 0, list[Tensor]()
    for run in runs:
        blocks = _blocks_of(v, run, q.dtype)
        count, _, of_home, size, _ = blocks.shape
        own = weights[..., at : at + count * of_home * size].unflatten(2, (count, of_home, size))
        values.append(_block_products(own.movedim((2, 3), (0, 2)), blocks, _weighted_sum).movedim(2, 1).flatten(0, 1))
        at += count * of_home * size
    out = _in_a_row(values, 0).sum(0) / total.masked_fill(total == 0, 1.0)
    lse = top + total.log()
    return out.reshape(1, q.shape[1], 1, -1), lse.reshape(1, q.shape[1], 1)


def _in_a_row(parts: list[Tensor], axis: int) -> Tensor:
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, axis)


def _block_products(rows: Tensor, blocks: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Products of rows [.., group, x] and blocks [n, Hk, b, keys, D]: [n, Hk, b, group, y]."""
    try:
        batches = [blocks.view(-1, *blocks.shape[3:])]
    except RuntimeError:  # a part of a home lies in a piece for each head
        batches = list(blocks.flatten(0, 1))
    rows = rows.expand(*blocks.shape[:3], -1, -1).reshape(len(batches), -1, *rows.shape[-2:])
    found = _in_a_row([product(own, batch) for own, batch in zip(rows, batches, strict=True)], 0)
    return found.view(*blocks.shape[:3], *found.shape[1:])


def _rows_by_keys(rows: Tensor, keys: Tensor) -> Tensor:
    return rows @ keys.transpose(1, 2)


def _weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """weights @ values; a weight of 0 hides even NaN and infinity."""
    found = weights @ values
    return found if found.sum().isfinite() else _seen_product(weights, values)


def _step_logits(products: Tensor, piece: _StepPiece, form: Logits) -> Tensor:
    """The logits that follow from products [Hk, group, keys], in place; -inf where the query does not see a key."""
    logits = products.mul_(form.scale)
    if form.softcap is not None:
        logits = logits.div_(form.softcap).tanh_().mul_(form.softcap)
    i, j = torch.tensor([[form.q_origin]]), torch.arange(piece.first, piece.end).unsqueeze(0)
    heads = logits.shape[0] * logits.shape[1]

    def by_head(x: Tensor) -> Tensor:
        """[.., 1 or Hq, 1, keys] -> broadcastable to the logits."""
        x = x.reshape(-1, x.shape[-1]) if x.dim() > 1 else x
        return x.view(*logits.shape[:2], -1) if len(x) == heads else x.unsqueeze(0)

    if piece.part.bias is not None:
        added = by_head(piece.part.bias(i, j))
        logits = logits.add_(added).masked_fill_(added == -torch.inf, -torch.inf)
    if not piece.full and not (seen := piece.part.visible(i, j)).all():
        logits = logits.masked_fill_(~by_head(seen), -torch.inf)
    return logits


def _blocks_of(store: Tensor, run: _Run, dtype: torch.dtype) -> Tensor:
    """[n, Hk, blocks, keys of a block, D] in `dtype`; of neighbours a view, if the store has that dtype."""
    page, slots = store.shape[2], slice(run.start, run.stop)
    if not run.gathered:
        found = store[run.homes[0] : run.homes[-1] + 1, :, slots]
    else:
        found = store.index_select(0, torch.tensor(run.homes))
        if page < _STEP_BLOCK or run.stop - run.start < len(run.homes) * page:
            found = found.transpose(0, 1).flatten(1, 2)[None, :, slots]
    return found.unflatten(2, (-1, min(_STEP_BLOCK, found.shape[2]))).to(dtype)


def _runs(piece: _StepPiece, homes: Sequence[int], page: int) -> Iterator[_Run]:
    """The keys of a piece in order: whole blocks, and what is less than a block at its ends."""
    first = min(piece.end, -(-piece.first // _STEP_BLOCK) * _STEP_BLOCK)
    last = max(first, piece.end // _STEP_BLOCK * _STEP_BLOCK)
    for start, end in ((piece.first, first), (first, last), (last, piece.end)):
        yield from _runs_of_blocks(start, end, homes, page)


def _runs_of_blocks(first: int, end: int, homes: Sequence[int], page: int) -> Iterator[_Run]:
    """Of whole blocks, or of a part of one."""
    while first < end:
        number, start = divmod(first, page)
        last, stop = number + 1, min(page, start + end - first)
        while start == 0 and (last + 1) * page <= end and homes[last] == homes[last - 1] + 1:
            last += 1
        keys = (last - number) * (stop - start)
        alone = last == number + 1 and keys == end - first
        if alone or page >= _GATHERED_KEYS or (page >= _STEP_BLOCK and keys >= min(_GATHERED_KEYS, end - first)):
            yield _Run(homes[number:last], start, stop)
        else:
            keys = min(end - first, _GATHERED_KEYS)
            yield _Run(homes[number : -(-(first + keys) // page)], start, start + keys, gathered=True)
        first += keys
