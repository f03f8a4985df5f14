"""A call with a cache: which sequences it is for, where its tokens lie, what is known of them once appended."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spdsl.runtime.cache.cache import CacheStore
from spdsl.runtime.cache.cache_arguments import expect_cache, expect_rows
from spdsl.runtime.cache.storage import NewTokens, Storage
from spdsl.runtime.call.arguments import autocast, check_tensor
from spdsl.runtime.call.cases import finish
from spdsl.runtime.call.examples import expect_gates
from spdsl.runtime.call.layouts import Options, checked_layout, layout_of
from spdsl.runtime.call.scale import scale_of_call
from spdsl.runtime.call.table import (
    Arguments,
    Inputs,
    changed_in,
    check_lookups,
    check_sums,
    check_vectors,
    check_weights,
    prepared,
    under_autocast,
)
from spdsl.runtime.launch.launch import uses_kernels
from spdsl.runtime.pools.pool import Pool
from spdsl.runtime.sequences import Layout, expect, expect_flag, expect_tensor


class Step(NamedTuple):
    """The tokens of a call, and the rows of the cache that get them, int64 [S]. None: all in order."""

    new: NewTokens
    rows: Tensor | None


class Brought(NamedTuple):
    """Which tokens a call brings: as `attention` takes all but `rows`, those of the cache, each once (None: all)."""

    lengths: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    rows: Sequence[int] | Tensor | None = None
    side: str = "left"


class Taken(NamedTuple):
    """What a call reads once its tokens are appended. kept int32 [S]: how many found room; None: certainly all."""

    own: Storage
    layout: Layout
    kept: Tensor | None


class Closes(NamedTuple):
    """A compressed stream whose entries close with the tokens of a call: see `Storage.close`."""

    name: str
    source: str
    pool: Pool
    weights_k: tuple[Tensor, ...] = ()
    weights_v: tuple[Tensor, ...] | None = None
    logits: str | None = None


_ALL = Brought()
ClosesOf = Callable[[Any], Sequence[Closes]]
"""What closes, of the inputs of a call."""


def _nothing(_: Any) -> Sequence[Closes]:
    return ()


def checked_step(
    arguments: Arguments,
    inputs: Inputs,
    phase: str,
    cache: CacheStore,
    kind: type,
    return_lse: object,
    brought: Brought = _ALL,
) -> tuple[Inputs, Step]:
    """The inputs under autocast and their step, after all checks of new tokens, and of the cache for them."""
    inputs = under_autocast(arguments, inputs)
    expect_flag("return_lse", return_lse)
    expect_cache(cache, kind)
    check_vectors(arguments, inputs)
    q, k, own = arguments.q(inputs), arguments.streams[0].k, inputs._asdict()
    first = arguments.queries[0].name
    check_new(arguments, inputs, cache)
    expect(q.shape[2] == own[k].shape[2], k, "{} tokens like {}", own[k].shape[2], q.shape[2], first)
    check_sums(arguments, inputs, phase)
    check_lookups(arguments, inputs)
    _check_kept(arguments, inputs, cache)
    return inputs, _step(cache, first, q, brought)


def step(
    arguments: Arguments,
    inputs: Inputs,
    phase: str,
    cache: CacheStore,
    kind: type,
    return_lse: object,
    brought: Brought = _ALL,
    scale: float | None = None,
    closes: ClosesOf = _nothing,
    gates: tuple[Any, int] | None = None,
) -> tuple[Inputs, Storage, Layout, Taken]:
    """Checks a call, appends its tokens, and says what it computes with and reads then; gates and their number."""
    scale, _ = scale_of_call(scale)
    inputs, own = checked_step(arguments, inputs, phase, cache, kind, return_lse, brought)
    if gates is not None:
        expect_gates(gates[0], arguments.q(inputs), gates[1])
    done = append(arguments, inputs, cache, own, closes(inputs), short=phase == "prefill")
    done = done._replace(layout=done.layout._replace(scale=scale))
    return *from_cache(arguments, inputs, done), done


def append_alone(
    arguments: Arguments,
    kind: type[Inputs],
    cache: CacheStore,
    given: Sequence[Tensor],
    named: Mapping[str, Tensor],
    brought: Brought = _ALL,
    closes: ClosesOf = _nothing,
) -> None:
    """Adds new tokens of a call without queries: keys and values, weights of entries, tensors over tokens."""
    names = [name for x in arguments.streams for name in (x.k, x.v) if name]
    stored = len(names)
    names += [x.name for x in arguments.weights if closes is not _nothing]
    names += [x.name for x in arguments.tensors if x.kept]
    values = _by_name("append", names, given, named)
    values |= zip(names[:stored], autocast(*[values[name] for name in names[:stored]]), strict=True)
    inputs = kind(*[values.get(name) for name in kind._fields])
    check_new(arguments, inputs, cache)
    if closes is not _nothing:
        check_weights(arguments, inputs)
    k = arguments.k(inputs)
    for tensor in arguments.tensors:
        if tensor.kept:
            x = getattr(inputs, tensor.name)
            expect_tensor(tensor.name, x)
            # No query says how many heads it has.
            heads = dict(zip(tensor.axes, x.shape[1:], strict=False)).get("head", 0)
            sizes = {"head": heads, "token": k.shape[2], "kv_head": k.shape[1], "batch": k.shape[0]}
            check_tensor(tensor.name, x, tensor.axes, tensor.kind, sizes, k)
    _check_kept(arguments, inputs, cache)
    append(arguments, inputs, cache, _step(cache, arguments.streams[0].k, k, brought), closes(inputs))


def _by_name(function: str, names: Sequence[str], given: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments in order and by name. Raises TypeError as a call of Python does."""
    if len(given) > len(names):
        raise TypeError(f"{function}() takes {len(names)} positional arguments but {len(given)} were given")
    values = dict(zip(names, given, strict=False))
    for name in named:
        if name not in names:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
        if name in values:
            raise TypeError(f"{function}() got multiple values for argument {name!r}")
    values |= named
    missing = [name for name in names if name not in values]
    if missing:
        raise TypeError(f"{function}() missing required arguments: {', '.join(missing)}")
    return values


def check_new(arguments: Arguments, inputs: Any, cache: CacheStore) -> None:
    """New keys and values [B, heads, T, dim], against the buffers that they go to."""
    own, first = inputs._asdict(), arguments.streams[0].k
    for stream in arguments.streams:
        for name, buffers in ((stream.k, cache.k), (stream.v, cache.v)):
            if name:
                x = own[name]
                expect_tensor(name, x)
                expect(x.dim() == 4, name, "4 dimensions [batch, heads, tokens, dim]", list(x.shape))
                same = x.shape[0] == own[first].shape[0] and x.shape[2] == own[first].shape[2]
                expect(same, name, "batch and tokens like {}", list(x.shape), first)
                cache.expect_fits(name, buffers[stream.name], x)


def _check_kept(arguments: Arguments, inputs: Any, cache: CacheStore) -> None:
    """Tensors over tokens, checked by themselves, against what the cache keeps of them."""
    for tensor in arguments.tensors:
        if tensor.kept:
            pairs = tensor.axes.count("token") > 1
            expect(
                not pairs, tensor.name, "one token axis where a cache keeps a tensor", ", ".join(map(str, tensor.axes))
            )
            cache.expect_sizes_of(tensor.name, getattr(inputs, tensor.name))


def _step(
    cache: CacheStore,
    name: str,
    x: Tensor,
    brought: Brought,
) -> Step:
    """Of new tokens x [B, heads, T, dim] of the argument `name`: dense, left-padded, or packed for S sequences.

    On the CPU wrong numbers are refused; a GPU is not asked.
    """
    lengths, cu_seqlens, max_seqlen, rows, side = brought
    chosen = None if rows is None else expect_rows(rows, cache.batch, cache.spans.device, once=True)
    sequences, whose = (cache.batch, "the cache") if chosen is None else (len(chosen), "rows")
    look = layout_of if uses_kernels(x) else checked_layout
    layout = look(x, x, Options(cu_seqlens, max_seqlen, lengths=lengths, side=side))
    if cu_seqlens is None:
        expect(x.shape[0] == sequences, name, "batch {} like {}", x.shape[0], sequences, whose)
    else:
        expect(len(cu_seqlens) == sequences + 1, "cu_seqlens", "{} numbers", len(cu_seqlens), sequences + 1)
    return Step(NewTokens(layout.longest, layout.q_spans), chosen)


def append(
    arguments: Arguments, inputs: Any, cache: CacheStore, step: Step, closes: Sequence[Closes] = (),
    short: bool = False,
) -> Taken:  # fmt: skip
    """Adds the new tokens to the cache, and the entries that close with them; -> what the call reads.

    short: it reads the tokens of cells that have not closed as entries, too, where cells are `partial`.
    """
    given, before = inputs._asdict(), _lengths_before(cache, step)
    own = cache.append_tokens(
        {x.name: given[x.k] for x in arguments.streams},
        {x.name: given[x.v] for x in arguments.streams if x.v},
        {x.name: given[x.name] for x in arguments.tensors if x.kept},
        step.new,
        step.rows,
    )
    for x in closes:
        close(own, x, step.new.longest, short)
    cache.closed(own, step.rows)
    return _taken(own, step.new, before)


def close(own: Storage, x: Closes, added: int, short: bool) -> None:
    """The entries that close with the last `added` tokens, and `short` that of the tokens behind them."""
    own.close(x.name, x.source, added, x.pool, x.weights_k, x.weights_v, logits=x.logits)
    if short and own.entries[x.name].cells.partial:
        own.close_short(x.name, x.source, x.pool, x.weights_v)


def _lengths_before(cache: CacheStore, step: Step) -> Tensor | None:
    """The lengths until the call, if a sequence may get fewer tokens than the longest."""
    if step.new.spans is None and not cache.may_overflow(step.new.longest):
        return None
    return cache.lengths.clone() if step.rows is None else cache.lengths.index_select(0, step.rows)


def _taken(own: Storage, new: NewTokens, before: Tensor | None) -> Taken:
    """The queries of a sequence are those at tokens that were kept: the others are in none. Of single tokens, one of
    each sequence, all are asked, and `answer` empties the others.
    """
    kept, spans = None if before is None else own.lengths - before, None
    if kept is not None and (new.longest > 1 or new.spans is not None):
        start = torch.zeros_like(kept) if new.spans is None else new.spans[:, 0]
        spans = torch.stack([start, kept], 1)
    return Taken(own, Layout(spans, own.spans, None, None, new.longest, own.capacity), kept)


def from_cache(arguments: Arguments, inputs: Inputs, done: Taken) -> tuple[Inputs, Storage, Layout]:
    """The inputs of a step with the kept tensors of all tokens in place of those of the new ones; what it reads."""
    own = done.own
    changed: dict[str, Any] = {}
    for tensor in arguments.tensors:
        if tensor.kept:
            kept = own.token_values(tensor.name)
            changed[tensor.name] = kept.view(torch.bool) if tensor.kind == "bool" else kept
        elif tensor.by_token:
            changed[tensor.name] = None  # no phase with a cache reads it
    inputs = changed_in(inputs, changed)
    sizes = (own.capacity, own.capacity, len(own.spans))
    return prepared(arguments, inputs, done.layout, *sizes), own, done.layout


def answer(part: tuple[Tensor, Tensor], done: Taken, return_lse: bool) -> Any:
    """out, or (out, lse); a token that found no room has out 0 and lse -inf."""
    out, lse = part
    if done.kept is not None and done.layout.q_spans is None:
        none = (done.kept == 0).view(-1, *[1] * (lse.dim() - 1))
        out = out.masked_fill(none[..., None] if lse.dim() < out.dim() else none, 0)
        lse = lse.masked_fill(none, -torch.inf)
    return finish((out, lse), return_lse)
