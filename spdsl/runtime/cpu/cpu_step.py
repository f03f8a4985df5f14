"""One query over the keys of a cache, on CPU tensors, where they lie: a step takes each key from memory once.

A sequence lies in homes: pages, or the one row of a cache without pages. All products are of blocks of 64 keys, and
added in the order of the keys: so no bit depends on where they lie. Homes that are neighbours, in whatever order the
sequence has them, are one batched product; others are gathered a few at a time, and narrow types widened, so that
copies stay in the cache of a core. One query is bound by memory, and such products are as fast as the flash kernel.
Only they use all cores: beside another process every operation that does waits for the slowest one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spdsl.runtime.cpu.cpu_engines import seen_product, share_of, with_sink
from spdsl.runtime.cpu.cpu_threads import on_cores
from spdsl.runtime.cpu.cpu_tiles import Logits, Part

_STEP_BLOCK = 64  # keys of a product
_GATHERED_KEYS = 512  # copied at once: 1 MB of 8 heads of 64 in fp32
_LEAST_USED = 0.75  # of a batch that holds blocks of nobody
_SHARED_NUMBERS = 1 << 19  # from here on a product takes longer than a thread to wake up: 0.1 ms


class _Run(NamedTuple):
    """Neighbouring homes, or `gathered` ones, and slots [start, stop) of each; of homes smaller than a block of all."""

    homes: Sequence[int]
    start: int
    stop: int
    blocks: Sequence[int]  # the number of each block, home by home
    gathered: bool = False


def sparse_step(
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
    rows = q.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    found = [(rows.new_zeros(*q.shape[:3], parts[0].v.shape[3]), rows.new_full(q.shape[:3], -torch.inf))]  # of no keys
    cores = torch.get_num_threads()
    with on_cores(1):
        for part, own in zip(parts, visits, strict=True):
            found += [_range_results(rows, part, visit, homes, form, cores) for visit in own]
        outs, lses = (torch.cat(x) for x in zip(*found, strict=True))
        lse = lses.logsumexp(0, keepdim=True)
        out = (outs * share_of(lses, lse).unsqueeze(-1)).sum(0, keepdim=True)
        if sink is not None:
            out, lse = with_sink(out, lse, sink.detach().to(lse.dtype).view(1, -1, 1))
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
    """As `sparse_step`, over the units that each list names: chosen int32 [1, Hc, 1, n], -1 for none.

    `visible` and `bias` take query positions, key numbers and heads as in `units_forward`. Head h of q reads list
    h // (Hq // Hc).
    """
    group, length = q.shape[1] // chosen.shape[1], form.q_origin + 1

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
        return sparse_step(q[:, own], [part], [visits], homes, form, None if sink is None else sink[own])

    found = [run(number) for number in range(chosen.shape[1])]
    return torch.cat([out for out, _ in found], 1), torch.cat([lse for _, lse in found], 1)


def _range_results(
    q: Tensor, part: Part, visit: tuple[int, int, bool], homes: Sequence[int], form: Logits, cores: int
) -> tuple[Tensor, Tensor]:
    """Output [1, Hq, 1, Dv] and lse [1, Hq, 1] over a range of keys."""
    k, v, rows = part.k, part.v, q.view(part.k.shape[1], -1, q.shape[3])  # the heads of a kv head share its keys
    segments = [(first, end, list(_runs(first, end, homes, k))) for first, end in _segments(*visit[:2])]
    logits = []
    for first, end, runs in segments:
        blocks = max(1, (end - first) // _STEP_BLOCK)
        found = _run_products(rows.expand(blocks, -1, -1, -1), k, runs, True, cores)
        logits.append(_step_logits(found, part, first, end, visit[2], form))
    top = torch.stack([x.amax((0, 3)) for x in logits]).amax(0)
    least = top.masked_fill(top == -torch.inf, 0.0).unsqueeze(-1)
    sums, values = [], []
    for weights, (_, _, runs) in zip(logits, segments, strict=True):
        weights = weights.sub_(least).exp_()
        found = _run_products(weights, v, runs, False, cores)
        # In one layout, whatever that of the store: the order of a sum of torch follows it.
        sums.append(weights.sum(3).contiguous().sum(0))
        values.append(found.contiguous().sum(0))
    total = torch.stack(sums).sum(0)
    out = torch.stack(values).sum(0) / total.masked_fill(total == 0, 1.0).unsqueeze(-1)
    return out.reshape(1, q.shape[1], 1, -1), (top + total.log()).reshape(1, q.shape[1], 1)


def _run_products(rows: Tensor, store: Tensor, runs: Sequence[_Run], by_key: bool, cores: int) -> Tensor:
    """Products of rows [blocks, Hk, group, x] with the blocks of a segment: [blocks, Hk, group, y].

    `by_key`: with each key of them. Else weights of their values, and a weight of 0 hides even NaN and infinity.
    """
    if len(runs) == 1 and list(runs[0].blocks) == list(range(len(rows))):
        return _block_products(rows, _blocks_of(store, runs[0], rows.dtype), by_key, cores)
    numbers = [torch.tensor(run.blocks) for run in runs]
    found = [
        _block_products(rows[own], _blocks_of(store, run, rows.dtype), by_key, cores)
        for own, run in zip(numbers, runs, strict=True)
    ]
    return torch.empty(len(rows), *found[0].shape[1:], dtype=rows.dtype).index_copy_(
        0, torch.cat(numbers), torch.cat(found)
    )


def _block_products(rows: Tensor, blocks: Tensor, by_key: bool, cores: int) -> Tensor:
    """Of rows [n * b, Hk, group, x] and blocks [n, Hk, b, keys, D]: [n * b, Hk, group, y]."""
    rows = rows.unflatten(0, (len(blocks), -1)).movedim(2, 1)
    if found := _one_batch(blocks):
        batch, of_head = found
        more = of_head - blocks.shape[2]
        room = torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, more)) if more else rows
        with on_cores(cores if batch.numel() >= _SHARED_NUMBERS else 1):
            results = room.reshape(-1, *rows.shape[3:])[: len(batch)] @ (batch.mT if by_key else batch)
        sizes = (len(blocks) * blocks.shape[1], blocks.shape[2], *results.shape[1:])
        results = results.as_strided(sizes, (of_head * results.stride(0), *results.stride()))
    else:
        heads = zip(rows.flatten(0, 1), blocks.flatten(0, 1), strict=True)
        results = torch.stack([own @ (block.mT if by_key else block) for own, block in heads])
    if not by_key and not results.sum().isfinite():
        results = seen_product(rows, blocks).flatten(0, 1)
    products: Tensor = results.unflatten(0, (len(blocks), -1)).movedim(2, 1).flatten(0, 1)
    return products


def _one_batch(blocks: Tensor) -> tuple[Tensor, int] | None:
    """Blocks [n, Hk, b, keys, D] as [batch, keys, D] without a copy, and how many of the batch each head has.

    Those behind the b of a head are nobody's; where they would be many there is no such batch.
    """
    count, heads, of_head, *block = blocks.shape
    try:
        return blocks.view(-1, *block), of_head
    except RuntimeError:
        _, head, step, *inner = blocks.stride()
    room = head // step
    if count > 1 or head % step or _LEAST_USED * room > of_head:
        return None
    return blocks.as_strided(((heads - 1) * room + of_head, *block), (step, *inner)), room


def _step_logits(products: Tensor, part: Part, first: int, end: int, full: bool, form: Logits) -> Tensor:
    """The logits, -inf where a key is hidden, of products [blocks, Hk, group, keys of a block], in place."""
    count, heads, group, size = products.shape
    logits = products.mul_(form.scale)
    if form.softcap is not None:
        logits = logits.div_(form.softcap).tanh_().mul_(form.softcap)
    i, j = torch.tensor([[form.q_origin]]), torch.arange(first, end).unsqueeze(0)

    def by_block(x: Tensor) -> Tensor:
        """[.., 1 or Hq, 1, keys, or 1: the same for all] -> broadcastable to the logits."""
        x = x.expand(*x.shape[:-1], end - first).reshape(-1, count, size)
        by_head: Tensor = x.unflatten(0, (heads, group) if len(x) == heads * group else (1, 1))
        return by_head.movedim(2, 0)

    if part.bias is not None:
        added = by_block(part.bias(i, j))
        logits = logits.add_(added).masked_fill_(added == -torch.inf, -torch.inf)
    if not full and not (seen := part.visible(i, j)).all():
        logits = logits.masked_fill_(~by_block(seen), -torch.inf)
    return logits


def _blocks_of(store: Tensor, run: _Run, dtype: torch.dtype) -> Tensor:
    """[n, Hk, blocks of a home, keys of a block, D] in `dtype`; of neighbours a view, if the store has that dtype."""
    slots = slice(run.start, run.stop)
    if not run.gathered:
        found = store[run.homes[0] : run.homes[-1] + 1, :, slots]
    else:
        found = store.index_select(0, torch.tensor(run.homes))
        if store.shape[2] < _STEP_BLOCK:
            found = found.transpose(0, 1).flatten(1, 2).unsqueeze(0)[:, :, slots]
    blocks: Tensor = found.unflatten(2, (-1, min(_STEP_BLOCK, found.shape[2])))
    return blocks.to(dtype)


def _segments(first: int, end: int) -> list[tuple[int, int]]:
    """The whole blocks of a range, and what is less than a block at its ends."""
    start = min(end, -(-first // _STEP_BLOCK) * _STEP_BLOCK)
    stop = max(start, end // _STEP_BLOCK * _STEP_BLOCK)
    return [(a, b) for a, b in ((first, start), (start, stop), (stop, end)) if a < b]


def _runs(first: int, end: int, homes: Sequence[int], store: Tensor) -> Iterator[_Run]:
    """Where the keys of a segment lie."""
    page, narrow = store.shape[2], store.element_size() < 4
    if page < _STEP_BLOCK:
        for at in range(first, end, _GATHERED_KEYS):
            stop, start = min(end, at + _GATHERED_KEYS), at % page
            blocks = range((at - first) // _STEP_BLOCK, -(-(stop - first) // _STEP_BLOCK))
            yield _Run(homes[at // page : -(-stop // page)], start, start + stop - at, blocks, True)
        return
    whole = range(-(-first // page), end // page)
    edges = [(first, min(end, whole.start * page)), (max(first, whole.stop * page), end)]
    for at, stop in edges if whole.start <= whole.stop else [(first, end)]:
        most = _GATHERED_KEYS if narrow else max(1, stop - at)
        for cut in range(at, stop, most):
            last, number = min(stop, cut + most), cut // page
            blocks = range((cut - first) // _STEP_BLOCK, -(-(last - first) // _STEP_BLOCK))
            yield _Run(homes[number : number + 1], cut % page, cut % page + last - cut, blocks)
    yield from _whole_homes(whole, first, homes, page, narrow)


def _whole_homes(whole: range, first: int, homes: Sequence[int], page: int, narrow: bool) -> Iterator[_Run]:
    """In the order of the store: neighbours together, a few at a time where they are few or narrow."""
    order = sorted(whole, key=homes.__getitem__)
    few, of_home, at = max(1, _GATHERED_KEYS // page), page // _STEP_BLOCK, 0
    while at < len(order):
        last = at + 1
        while (
            last < len(order) and homes[order[last]] == homes[order[last - 1]] + 1 and not (narrow and last - at >= few)
        ):
            last += 1
        gathered = last - at < min(few, len(order) - at)
        last = at + few if gathered else last
        numbers = [(number * page - first) // _STEP_BLOCK for number in order[at:last]]
        blocks = [block + i for block in numbers for i in range(of_home)]
        yield _Run([homes[number] for number in order[at:last]], 0, page, blocks, gathered)
        at = last
