"""The states of a cache: every buffer that is kept of the tokens so far, in one table."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class State(NamedTuple):
    """One buffer: for each place of a grid the numbers that `axes` say.

    name: `k.<stream>`, `v.<stream>`, `tokens.<tensor>`, as the cache has them in `k`, `v` and `tokens`.
    grid: `token`, in pages where the cache has some; `row`: one number of each token, never in pages; or the name of
    the compressed stream whose entries they are. update: `append`, with each new token, or `close`, with each entry
    that closes.
    """

    name: str
    grid: str
    axes: tuple[tuple[str, int], ...]
    dtype: torch.dtype
    update: str

    @property
    def of(self) -> tuple[str, str]:
        """Which dict of the cache holds it, under which name."""
        side, _, name = self.name.partition(".")
        return side, name


class Kept(NamedTuple):
    """What a state occupies: the shape of its buffer, and all bytes that are held for it."""

    shape: tuple[int, ...]
    bytes: int


def kept_of(x: Tensor) -> Kept:
    return Kept(tuple(x.shape), x.untyped_storage().nbytes())


def stream_states(
    name: str, heads: int, qk_dim: int, v_dim: int, grid: str, update: str, dtype: torch.dtype
) -> list[State]:
    """Keys, and values where a stream has its own (v_dim > 0)."""
    dims = {"k": qk_dim, "v": v_dim}
    return [
        State(f"{side}.{name}", grid, (("head", heads), ("dim", dim)), dtype, update)
        for side, dim in dims.items()
        if side == "k" or dim
    ]
