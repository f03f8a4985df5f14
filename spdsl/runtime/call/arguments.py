"""Checking and preparing the arguments of the public functions: each message names the argument, what was expected
and what came."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from spdsl.runtime.call.lists import random_units, sequence_counts
from spdsl.runtime.call.tile_maps import row_tiles, sequences_of, tile_map
from spdsl.runtime.launch.launch import wide
from spdsl.runtime.sequences import DTYPES, Layout, expect, expect_tensor

TRANSPOSED = " (of [batch, tokens, heads, dim] pass x.transpose(1, 2), which costs no copy)"
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_KINDS = {"float": "floating point", "int": "an integer dtype", "bool": "bool"}


def check_attention(
    queries: Mapping[str, tuple[Tensor, int | None, int | None]],
    keys: Mapping[str, tuple[Tensor, int | None, str]],
    values: Mapping[str, tuple[Tensor, int | None, str]],
) -> None:
    """queries name -> ([B, Hq, N, D], heads, dim); keys name -> ([B, Hk, M, D], heads, name of the query that asks
    them); values name -> ([B, Hk, M, Dv], dim, name of their keys).

    Declared heads and dims must match; None leaves them to the call. All queries have one number of tokens; heads and
    dim are those of the first unless declared.
    """
    first_name, (first, *_) = next(iter(queries.items()))
    for name, (x, *_) in [*queries.items(), *keys.items(), *values.items()]:
        expect_tensor(name, x)
        expect(x.dim() == 4, name, "4 dimensions [batch, heads, tokens, dim]", list(x.shape))
        expect(x.dtype in DTYPES, name, "float16, bfloat16, float32 or float64", x.dtype)
        expect(x.shape[3] > 0, name, "a head dim of 1 or more", 0)
        expect(x.dtype == first.dtype, name, f"dtype {first.dtype} like {first_name}", x.dtype)
        expect(x.device == first.device, name, f"device {first.device} like {first_name}", x.device)
        expect(x.shape[0] == first.shape[0], name, "batch {} like {}", x.shape[0], first.shape[0], first_name)
    for name, (x, heads, dim) in queries.items():
        expect_heads(name, x, heads)
        expect(dim is None or x.shape[3] == dim, name, f"head dim {dim}", x.shape[3])
        wanted = [first.shape[0], heads or first.shape[1], first.shape[2], dim or first.shape[3]]
        expect(list(x.shape) == wanted, name, "shape {} like {}", list(x.shape), wanted, first_name)
    tokens = next(iter(keys.values()))[0].shape[2]
    for name, (x, heads, asking) in keys.items():
        q = queries[asking][0]
        expect(x.shape[3] == q.shape[3], name, "head dim {} like {}", x.shape[3], q.shape[3], asking)
        expect(x.shape[2] == tokens, name, "{} tokens like the other keys", x.shape[2], tokens)
        expect_heads(name, x, heads)
        if not (x.shape[1] > 0 and q.shape[1] % x.shape[1] == 0):
            wrong = f"heads that divide the {q.shape[1]} of {asking}"
            expect(False, name, wrong, f"{x.shape[1]}{TRANSPOSED if _swapped(q, x) else ''}")
    for name, (x, dim, key) in values.items():
        k = keys[key][0]
        if list(x.shape[:3]) != list(k.shape[:3]):
            swapped = list(x.transpose(1, 2).shape[:3]) == list(k.shape[:3])
            wrong = f"shape {list(k.shape[:3])} + [dim]"
            expect(False, name, wrong, f"{list(x.shape)}{TRANSPOSED if swapped else ''}")
        expect(dim is None or x.shape[3] == dim, name, f"head dim {dim}", x.shape[3])


def _swapped(q: Tensor, k: Tensor) -> bool:
    """Whether heads and tokens look as if they stood in each other's place."""
    more_heads = q.shape[1] > q.shape[2] and k.shape[1] > k.shape[2] > 0
    return more_heads and q.shape[2] % k.shape[2] == 0


def warn_of_layout(name: str, q: Tensor, k: Tensor) -> None:
    """More heads than tokens, and fewer keys than queries: it can be meant, but [batch, tokens, heads, dim] is more
    likely, of which as many heads as there are tokens divide each other."""
    if not torch.compiler.is_compiling() and q.shape[2] > k.shape[2] and _swapped(q, k):
        text = f"{name}: {q.shape[1]} heads of {q.shape[2]} tokens, for {k.shape[2]} keys{TRANSPOSED}"
        warnings.warn(text, UserWarning, stacklevel=4)


def expect_heads(name: str, x: Tensor, heads: int | None) -> None:
    """As many as the pattern declares, if it does."""
    if heads is not None and x.shape[1] != heads:
        expect(False, name, f"{heads} heads", f"{x.shape[1]}{TRANSPOSED if x.shape[2] == heads else ''}")


def check_values(values: Mapping[str, Tensor]) -> None:
    """What becomes one result has values of one dim."""
    first_name, first = next(iter(values.items()))
    for name, x in values.items():
        expect(x.shape[3] == first.shape[3], name, "head dim {} like {}", x.shape[3], first.shape[3], first_name)


def tensor_argument(
    name: str, x: Tensor, axes: Sequence[str | int], kind: str, sizes: Mapping[str, int], q: Tensor
) -> Tensor:
    """The tensor, batch first; the batch may be left out where no axis is `token`. bool comes back as uint8."""
    check_tensor(name, x, axes, kind, sizes, q)
    if x.dim() == len(axes):
        x = x.unsqueeze(0)
    if x.is_floating_point():  # a slope times a distance needs more than the 8 bits of bf16
        exact = torch.promote_types(x.dtype, wide(q.dtype))
        # One of rows may have a number for each pair: it is not copied, what is read of it has 32 bits.
        x = x if "query" in axes and exact != torch.float64 else x.to(exact)
    return x.view(torch.uint8) if x.dtype == torch.bool else x


def check_tensor(
    name: str, x: Tensor, axes: Sequence[str | int], kind: str, sizes: Mapping[str, int], q: Tensor
) -> None:
    """Type, device and shape of a tensor of the pattern.

    One with a `query` axis has the rows of q, and as many tokens as the caller gives it.
    """
    expect_tensor(name, x)
    fits = {"float": x.is_floating_point(), "bool": x.dtype == torch.bool}.get(
        kind, not x.is_floating_point() and not x.is_complex() and x.dtype != torch.bool
    )
    expect(fits, name, _KINDS[kind], x.dtype)
    known = x.dtype in (*DTYPES, torch.bool, *_INTEGERS)
    expect(known, name, "a dtype that PyTorch computes with, such as int64 or float32", x.dtype)
    expect(x.device == q.device, name, f"device {q.device}", x.device)
    shape = list(x.shape)
    if x.dim() == len(axes) and "token" not in axes:
        shape = [1, *shape]
    by_row = "query" in axes
    batch = q.shape[0] if by_row else sizes["batch"]
    free = [by_row and axis == "token" for axis in axes]
    wanted = [sizes[axis] if isinstance(axis, str) else axis for axis in axes]
    fits = len(shape) == len(axes) + 1 and shape[0] in (1, batch)
    fits = fits and all(any_size or size == own for any_size, size, own in zip(free, wanted, shape[1:], strict=True))
    named = ", ".join("any" if any_size else "{}" for any_size in free)
    said = [size for any_size, size in zip(free, wanted, strict=True) if not any_size]
    expect(fits, name, f"[1 or {{}}] + [{named}]", list(x.shape), batch, *said)


def autocasting(x: object) -> str | None:
    """The type of device of x, if torch.autocast is on for it."""
    kind = x.device.type if isinstance(x, Tensor) else "cpu"
    # torch 2.11 cannot trace torch.amp.is_autocast_available
    return None if kind == "meta" or not torch.is_autocast_enabled(kind) else kind


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values under torch.autocast: as for PyTorch's own attention, all in the type it chose."""
    kind = autocasting(tensors[0])
    if kind is None:
        return tensors
    wanted = torch.get_autocast_dtype(kind)
    return tuple(x.to(wanted) if isinstance(x, Tensor) and x.dtype in DTYPES[:3] else x for x in tensors)


def refuse_gradient(name: str, x: Tensor) -> None:
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(
            f"{name}: gets no gradient where a bias reads it like that; pass {name}.detach(), or read it at positions "
            "of the query or of the key alone, at [q][k], or on axes of declared sizes"
        )


def check_sinks(name: str, sinks: Tensor, q: Tensor) -> None:
    """One logit for each query head, [Hq]."""
    expect_tensor(name, sinks)
    expect(list(sinks.shape) == [q.shape[1]], name, "[{}]", list(sinks.shape), q.shape[1])
    expect(sinks.dtype in DTYPES, name, _KINDS["float"], sinks.dtype)
    expect(sinks.device == q.device, name, f"device {q.device}", sinks.device)


def check_given(name: str, units: Tensor, heads: int, rows: int, q: Tensor) -> None:
    """Lists [sequences, heads, row tiles, most], of integers."""
    expect_tensor(name, units)
    expect(units.dtype in (torch.int32, torch.int64), name, "int32 or int64", units.dtype)
    expect(units.device == q.device, name, f"device {q.device}", units.device)
    fits = units.dim() == 4 and units.shape[1] in (1, heads)
    expect(fits, name, "[batch, {}, row tiles of {}, most]", list(units.shape), heads, rows)


def check_tiles(name: str, units: Tensor, heads: int, rows: int, q: Tensor, layout: Layout) -> None:
    """The same, as many as the call has sequences and, where the host knows it, tiles of rows."""
    check_given(name, units, heads, rows, q)
    sequences = sequences_of(q, layout)
    expect(units.shape[0] in (1, sequences), name, "{} sequences", units.shape[0], sequences)
    if layout.k_spans is None:
        tiles = row_tiles(q, layout, rows)
        expect(units.shape[2] == tiles or q.shape[2] == 0, name, "{} row tiles", units.shape[2], tiles)


def given_argument(
    name: str, units: Tensor, heads: int, rows: int, unit: int, q: Tensor, k: Tensor, layout: Layout, most_keys: int
) -> tuple[Tensor, Tensor]:
    """Lists [S, heads, row tiles, most] -> (membership map uint8 [S, heads, row tiles, units], first row tile [S])."""
    check_tiles(name, units, heads, rows, q, layout)
    return tile_map(units, rows, -(-most_keys // unit), q, k, layout)


def random_argument(
    count: int,
    seed: int,
    heads: int,
    rows: int,
    unit: int,
    causal: bool,
    q: Tensor,
    k: Tensor,
    layout: Layout,
    most: int,
) -> tuple[Tensor, Tensor]:
    """The map of a `random` set and its first row tile, 0. Drawn once per shape where it knows no lengths."""
    tiles, units = -(-most // rows), -(-most // unit)
    if causal:
        found = _drawn(count, seed, heads, rows, unit, tiles, units, q.device)
    else:
        keys = sequence_counts(q, k, layout)[3]
        found = random_units(count, seed, heads, rows, unit, False, tiles, units, keys).view(torch.uint8)
    return found, torch.zeros(1, dtype=torch.int32, device=q.device)


@lru_cache(maxsize=16)
def _drawn(
    count: int, seed: int, heads: int, rows: int, unit: int, tiles: int, units: int, device: torch.device
) -> Tensor:
    return random_units(count, seed, heads, rows, unit, True, tiles, units, None).view(torch.uint8).to(device)
