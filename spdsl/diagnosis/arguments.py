"""The arguments of one layer's call: from the data, from the weights, and what neither has at random."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from spdsl.diagnosis.data import listed
from spdsl.ir.pattern import Choice, Pattern, Query, Stream, Values, Weight
from spdsl.ir.pattern import Tensor as TensorInput
from spdsl.oracle.layouts import cut


@dataclass(frozen=True, slots=True)
class Arguments:
    """Tensors by argument, and a line about each that is not simply the data's."""

    tensors: dict[str, Tensor]
    notes: tuple[str, ...]


def arguments(
    pattern: Pattern,
    module: ModuleType,
    data: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    phase: str,
    seed: int,
) -> Arguments:
    """All that the module asks for. A query, a key or a value of another name than the data's takes `q`, `k` or `v`
    where heads and dims allow it; what is left is drawn as `example_inputs` draws it.

    Raises ValueError for what does not fit.
    """
    found: dict[str, Tensor] = {}
    notes: list[str] = []
    for name, plain, sizes in vectors(pattern):
        if name in data:
            found[name] = vector(name, data[name])
        elif plain in data and _fits(data[plain], sizes):
            found[name] = vector(plain, data[plain])
            notes.append(f"{name}: `{plain}` of the data")
    _check_sides(pattern, data, found)
    _check_lengths(pattern, found)
    wanted = [one.name for one in pattern.inputs if isinstance(one, TensorInput | Choice | Weight)] + ["gates"]
    for name in wanted:
        for held in (weights, data):
            if name in held:
                found.setdefault(name, _finite(name, held[name]))
    drawn = _drawn(module, found, phase, seed)
    _check_shapes(pattern, module, found | drawn, phase)
    return Arguments(found | drawn, (*notes, *(f"{name}: {_said(pattern, name, seed)}" for name in drawn)))


def vectors(pattern: Pattern) -> Iterator[tuple[str, str, tuple[int | None, int | None]]]:
    """Arguments with a head dim: the name, which of q, k, v it is, its heads and dims where the pattern says them."""
    queries = [one for one in pattern.inputs if isinstance(one, Query)]
    for query in queries:
        heads, dim = (pattern.query_heads, pattern.qk_dim) if query is queries[0] else (None, None)
        yield query.name, "q", (query.heads or heads, query.dim or dim)
    for stream in pattern.inputs:
        if isinstance(stream, Stream) and stream.compress is None:
            heads = stream.heads or pattern.kv_heads
            yield stream.key_argument, "k", (heads, stream.qk or pattern.qk_dim)
            if stream.value is Values.OWN:
                assert stream.value_argument is not None
                yield stream.value_argument, "v", (heads, stream.v or pattern.v_dim)


def _check_sides(pattern: Pattern, data: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Some queries, some keys and some values are the data's."""
    for side in "qkv":
        asked = [(name, sizes) for name, plain, sizes in vectors(pattern) if plain == side]
        if not asked or any(name in found for name, _ in asked):
            continue
        if side not in data:
            raise ValueError(f"{side}: the data holds none, it holds {listed(data)}")
        name, (heads, dim) = asked[0]
        wanted = f"{heads or 'any'} heads of dim {dim or 'any'}"
        raise ValueError(f"{side}: expected {wanted}, as {pattern.name} says, or {name}, got {list(data[side].shape)}")


def _fits(x: Tensor, sizes: tuple[int | None, int | None]) -> bool:
    heads, dim = sizes
    return x.dim() == 4 and heads in (None, x.shape[1]) and dim in (None, x.shape[3])


def vector(name: str, x: Tensor) -> Tensor:
    """[batch, heads, tokens, dim] of finite numbers, in float32 or float64."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = str(x.dtype).removeprefix("torch.") if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name}: expected float16, bfloat16, float32 or float64, got {kind}")
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError(f"{name}: expected [batch, heads, tokens, dim], none of them 0, got {list(x.shape)}")
    x = _finite(name, x).detach().cpu()
    return x if x.dtype == torch.float64 else x.float()


def _finite(name: str, x: Tensor) -> Tensor:
    """-inf and NaN would make every sum over them one."""
    if x.is_floating_point() and not bool(torch.isfinite(x).all()):
        bad = (~torch.isfinite(x)).nonzero()
        raise ValueError(f"{name}: {len(bad)} numbers are NaN or infinite, the first at {bad[0].tolist()}")
    return x


def _check_lengths(pattern: Pattern, found: Mapping[str, Tensor]) -> None:
    first, *others = found.items()
    for name, x in others:
        if x.shape[0] != first[1].shape[0]:
            raise ValueError(f"{name}: expected the batch of {first[0]}, {first[1].shape[0]}, got {x.shape[0]}")
    keys = {name: x.shape[2] for name, x in found.items() if name.partition("_")[0] in ("k", "v")}
    for name, tokens in keys.items():
        if tokens != next(iter(keys.values())):
            raise ValueError(
                f"{name}: expected the {next(iter(keys.values()))} tokens of {next(iter(keys))}, got {tokens}"
            )
    queries, tokens = first[1].shape[2], next(iter(keys.values()))
    if pattern.causal and queries > tokens:
        raise ValueError(
            f"{first[0]}: {queries} queries and {tokens} keys, but the last query stands at the last key, "
            f"so the first {queries - tokens} would see nothing"
        )
    if not pattern.causal and queries != tokens:
        raise ValueError(f"{first[0]}: expected a query for each of the {tokens} keys, got {queries}")


def _check_shapes(pattern: Pattern, module: ModuleType, found: Mapping[str, Tensor], phase: str) -> None:
    """What a call of the module says of heads, dims and dtypes, for one token: ValueError or TypeError."""
    one = cut(pattern, found, 0, 1)
    for choice in pattern.inputs:
        if isinstance(choice, Choice) and choice.name in one:
            one[choice.name] = one[choice.name][:, :, :1]
    asked = inspect.signature(module.reference).parameters
    module.reference(**{name: x for name, x in one.items() if name in asked}, phase=phase)


def _drawn(module: ModuleType, found: Mapping[str, Tensor], phase: str, seed: int) -> dict[str, Tensor]:
    """What the phase needs and nobody gave, the same for one seed."""
    q = next(iter(found.values()))
    k, v = (next((x for name, x in found.items() if name.partition("_")[0] == side), q) for side in ("k", "v"))
    asked = inspect.signature(module.reference).parameters
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: dict[str, Tensor] = module.example_inputs(
            q.shape[0], k.shape[2],
            heads=q.shape[1], kv_heads=k.shape[1], qk_dim=q.shape[3], v_dim=v.shape[3], dtype=q.dtype,
        )  # fmt: skip
    return {name: x for name, x in made.items() if name not in found and name in asked}


def _said(pattern: Pattern, name: str, seed: int) -> str:
    """Where a tensor comes from that nobody gave."""
    example = any(isinstance(one, TensorInput | Choice) and one.name == name for one in pattern.inputs)
    return f"{'an example' if example else f'random, seed {seed}'}, for the data has none"
