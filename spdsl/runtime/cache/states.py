"""The states of a cache: every buffer that is kept of the tokens so far, in one table."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spdsl.runtime.call.table import Arguments
from spdsl.runtime.launch.launch import wide
from spdsl.runtime.sequences import expect_number


class State(NamedTuple):
    """One buffer: for each place of a grid the numbers that `axes` say.

    name: `k.<stream>`, `v.<stream>`, `tokens.<tensor>`, as the cache has them in `k`, `v` and `tokens`.
    grid: `token`, in pages where the cache has some; `row`: of each token, too, but never in pages; or the name of the
    compressed stream whose entries they are. axes: name and size of all but the home and the place, which stands behind
    the first `before` of them; a size is None until the first call says it. update: `append`, with each new token, or
    `close`, with each entry that closes.
    """

    name: str
    grid: str
    axes: tuple[tuple[str, int | None], ...]
    before: int
    dtype: torch.dtype
    update: str

    @property
    def of(self) -> tuple[str, str]:
        """Which dict of the cache holds it, under which name."""
        side, _, name = self.name.partition(".")
        return side, name

    @property
    def sizes(self) -> list[int] | None:
        """Those of the axes; None: not all are known."""
        sizes = [size for _, size in self.axes if size is not None]
        return sizes if len(sizes) == len(self.axes) else None

    def shape(self, homes: int, places: int) -> list[int]:
        sizes = self.sizes
        assert sizes is not None, self.name
        return [homes, *sizes[: self.before], places, *sizes[self.before :]]

    def of_places(self, x: Tensor) -> Tensor:
        """x [homes, places] as what goes with a buffer."""
        return x.view(x.shape[0], *[1] * self.before, x.shape[1], *[1] * (len(self.axes) - self.before))

    def sizes_of(self, x: Tensor) -> list[int]:
        """Of x [homes, .., places, ..]: those of all but homes and places."""
        return [*x.shape[1 : 1 + self.before], *x.shape[2 + self.before :]]

    def sized(self, x: Tensor, anew: bool = False) -> State:
        """With the sizes of x [homes, .., places, ..] where none are known, or `anew`."""
        axes = zip(self.axes, self.sizes_of(x), strict=True)
        known = [(name, other if size is None or anew else size) for (name, size), other in axes]
        return self._replace(axes=tuple(known))


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
        State(f"{side}.{name}", grid, (("head", heads), ("dim", dim)), 1, dtype, update)
        for side, dim in dims.items()
        if side == "k" or dim
    ]


def token_states(arguments: Arguments, dtype: torch.dtype, kv_heads: int, heads: int | None = None) -> list[State]:
    """How a cache keeps the tensors over tokens. heads: of the query; None: as the first call has them."""
    dtypes = {"bool": torch.uint8, "int": torch.int64, "float": wide(dtype)}
    known = {
        "head": heads if heads is None else expect_number("query_heads", heads, "a number >= 1", 1),
        "kv_head": kv_heads,
    }
    found = []
    for x in arguments.tensors:
        if x.kept and x.axes.count("token") == 1:
            before = x.axes.index("token")
            axes = [(str(axis), known[axis] if isinstance(axis, str) else axis) for axis in x.axes if axis != "token"]
            found.append(State(f"tokens.{x.name}", "row", tuple(axes), before, dtypes[x.kind], "append"))
    return found
