"""Prefill and decode as torch.compile sees them: one operator each, which changes the buffers of the cache.

A graph knows nothing of what the host knows of a cache, which is another thing in every step. So it is the same for all
of them: the operator runs the function on a cache of the same buffers of which nothing is known, in which any token
might find no room. Nothing is read on the host.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache as once
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spdsl.runtime.cache.cache import CacheStore
from spdsl.runtime.cache.cache_arguments import expect_cache
from spdsl.runtime.call.arguments import autocast, autocasting
from spdsl.runtime.call.operators import mutating_operator
from spdsl.runtime.call.scale import expect_scale, scale_of_call
from spdsl.runtime.call.table import Arguments
from spdsl.runtime.launch.launch import wide
from spdsl.runtime.module import Module
from spdsl.runtime.sequences import INT32_MOST, expect_tensor

_SCHEMA = (
    "(Tensor?[] given, Tensor? lengths, str side, Tensor? cu_seqlens, SymInt? max_seqlen, Tensor? rows, float? scale,"
    " Tensor? traced_scale, Tensor? page_table, SymInt page, SymInt capacity, SymInt spare, Tensor(a!)[] states)"
)
_BY_NAME = ("cache", "return_lse", "lengths", "side", "cu_seqlens", "max_seqlen", "rows", "scale")

Function = Callable[..., Any]


class Result(NamedTuple):
    """One result of a call. values: the state that is averaged, `v.<stream>`, or the front `dim` of `k.<stream>`.

    branches: of a gate, each with a log-sum-exp; 0: there is one. rows: no branch, but counts of tiles of so many rows.
    """

    values: str
    dim: int = 0
    branches: int = 0
    rows: int = 0


def cached_call(
    module: Module, arguments: Arguments, kind: type[CacheStore], *results: Result
) -> Callable[[Function], Function]:
    """Makes `prefill` and `decode` of functions that check, append and attend; kind: the module's cache."""

    def decorate(function: Function) -> Function:
        run, bound = module.entry(function), _Binding(function, arguments)
        traced = _traced(module, arguments, kind, results, function, bound)

        @wraps(function)
        def call(*args: Any, **named: Any) -> Any:
            if torch.compiler.is_compiling():
                return traced(**bound.cast(args, named))
            device = autocasting(next(iter((*args, *named.values())), None))
            if device is None:
                return run(*args, **named)
            given = bound.cast(args, named)
            with torch.autocast(device, enabled=False):  # sums are float32, as in what PyTorch compiles
                return run(**given)

        return call

    return decorate


class _Binding:
    """The parameters of a function. `inspect` is asked once, as PyTorch cannot trace it."""

    def __init__(self, function: Function, arguments: Arguments) -> None:
        self.signature, self.vectors = inspect.signature(function), arguments.vectors
        parameters = self.signature.parameters
        self.names = frozenset(parameters)
        self.in_order = [name for name, x in parameters.items() if x.kind is x.POSITIONAL_OR_KEYWORD]
        self.tensors = [name for name in parameters if name not in _BY_NAME]

    def cast(self, args: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name, vectors as autocast wants them. Raises TypeError as the function would."""
        given: dict[str, Any] = {**dict(zip(self.in_order, args, strict=False)), **named}
        if len(given) < len(args) + len(named) or not self.names >= given.keys():
            self.signature.bind(*args, **named)
        for name in self.vectors:
            expect_tensor(name, given.get(name))
        given |= zip(self.vectors, autocast(*[given[name] for name in self.vectors]), strict=True)
        return given


def _traced(
    module: Module,
    arguments: Arguments,
    kind: type[CacheStore],
    results: Sequence[Result],
    function: Function,
    bound: _Binding,
) -> Function:
    """The same by an operator. What it does for itself leaves nothing in a graph, or tensors."""
    first, tensors = arguments.queries[0].name, bound.tensors

    def run(given: Sequence[Tensor | None], lengths: Any, side: str, cu_seqlens: Any, max_seqlen: Any, rows: Any,
            scale: Any, traced_scale: Any, *held: Any) -> tuple[Tensor, ...]:  # fmt: skip
        named: dict[str, Any] = {name: x for name, x in zip(tensors, given, strict=True) if x is not None}
        scale = scale if traced_scale is None else expect_scale(traced_scale.item())
        named |= {"lengths": lengths, "side": side, "cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen, "rows": rows}
        found = function(**named, cache=_stand_in(kind, arguments, *held), return_lse=True, scale=scale)
        parts = found if len(results) > 1 else [found]
        return tuple(x.contiguous() for part in parts for x in ([part] if isinstance(part, Tensor) else part))

    def fake(given: Sequence[Tensor | None], *others: Any) -> tuple[Tensor, ...]:
        q, buffers = given[tensors.index(first)], _by_state(kind, arguments, others[-1])
        shapes = (
            _counts(q, result, others) if result.rows else _shapes(q, result, buffers[result.values])
            for result in results
        )
        return tuple(x for own in shapes for x in own)

    # No list: an operator that changes its arguments gives tensors.
    tensors_of = [1 if result.rows else 2 for result in results]
    schema = f"{_SCHEMA} -> ({', '.join(['Tensor'] * sum(tensors_of))})"
    made = mutating_operator(module, f"{function.__name__}_step", schema, run, fake)

    def call(**given: Any) -> Any:
        cache: Any = given.get("cache")
        expect_cache(cache, kind)
        rows = given.get("rows")
        rows = rows if rows is None or isinstance(rows, Tensor) else torch.tensor(rows)
        page, spare = cache.page or 0, 0 if cache.ring is None else cache.ring.spare
        # Without a gradient: a graph that turned that off would leave it so where a step is refused.
        own = [None if given.get(name) is None else given[name].detach() for name in tensors]
        found = made(
            own, given.get("lengths"), given.get("side", "left"), given.get("cu_seqlens"), given.get("max_seqlen"),
            rows, *scale_of_call(given.get("scale")), cache.page_table, page, cache.capacity, spare,
            _buffers(arguments, cache, given),
        )  # fmt: skip
        # From now on the host knows nothing of lengths, but that none was taken back.
        cache.at_least, cache.at_most, cache.grown = 0, INT32_MOST, True
        places = [sum(tensors_of[:i]) for i in range(len(results))]
        whole = given.get("return_lse", False)
        answers = [
            (found[i], found[i + 1]) if whole and count == 2 else found[i]
            for i, count in zip(places, tensors_of, strict=True)
        ]
        return tuple(answers) if len(results) > 1 else answers[0]

    return call


def _counts(q: Any, result: Result, others: Sequence[Any]) -> tuple[Tensor]:
    """Counts of tiles as fake tensors: of one query, or of all tiles that the rows of a sequence may lie in."""
    cu_seqlens, max_seqlen = others[2:4]
    longest = q.shape[2] if cu_seqlens is None or max_seqlen is None else max_seqlen
    sequences = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    tiles = 1 if result.rows == 1 else -(-(longest - 1) // result.rows) + 1
    return (q.new_empty(sequences, q.shape[1], tiles, 2, dtype=torch.int32),)


def _shapes(q: Any, result: Result, values: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse of one result as fake tensors."""
    out = q.new_empty(*q.shape[:3], result.dim or values.shape[3])
    branches = (result.branches,) if result.branches else ()
    return out, q.new_empty(*q.shape[:3], *branches, dtype=wide(q.dtype))


def _buffers(arguments: Arguments, cache: CacheStore, given: Mapping[str, Any]) -> list[Tensor]:
    """All that a step writes to, in the order of `_by_state`; the first step may have to make some of it."""
    kept = [x.name for x in arguments.tensors if x.kept]
    if len(cache.tokens) < len(kept):
        for name in kept:
            expect_tensor(name, given.get(name))
        cache.size_tokens({name: given[name] for name in kept})
    return [
        cache.spans, cache.dropped, *cache.k.values(), *cache.v.values(), *[cache.tokens[name] for name in kept],
        *cache.entry_spans.values(),
    ]  # fmt: skip


@once
def _pattern_of(kind: Any) -> CacheStore:
    """A cache of no sequence, which has the names of all buffers."""
    sizes = {"kv_heads": 1, "qk_dim": 1, "v_dim": 1, "query_heads": 1}
    own = {name: size for name, size in sizes.items() if name in inspect.signature(kind.__init__).parameters}
    made: CacheStore = kind(0, 1, page=None, device="meta", **own)
    return made


def _by_state(kind: Any, arguments: Arguments, states: Sequence[Tensor]) -> dict[str, Tensor]:
    """The buffers by the names of their states; then those of entry spans."""
    own = _pattern_of(kind)
    names = [*(f"k.{name}" for name in own.k), *(f"v.{name}" for name in own.v)]
    names += [f"tokens.{x.name}" for x in arguments.tensors if x.kept]
    names += own.entry_spans
    return dict(zip(("spans", "dropped", *names), states, strict=True))


def _stand_in(
    kind: Any,
    arguments: Arguments,
    page_table: Tensor | None,
    page: int,
    capacity: int,
    spare: int,
    states: Sequence[Tensor],
) -> CacheStore:
    """A cache of these buffers, of which the host knows nothing."""
    own, found = copy.copy(_pattern_of(kind)), _by_state(kind, arguments, states)
    return own.with_buffers(found, page_table, page or None, capacity, spare)
