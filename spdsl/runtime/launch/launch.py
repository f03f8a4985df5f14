"""Launching kernels: configurations, constants, and the one function through which every kernel starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spdsl.runtime.language import tl, triton
from spdsl.runtime.sequences import Layout
from spdsl.runtime.tiles.kernel import Call, Const, Source, Strided
from spdsl.runtime.tiles.tiles import row_delta
from spdsl.runtime.tuning.configs import (
    SMALL,
    TABLES,
    Config,
    Tables,
    block_room,
    chained,
    lookup,
    plain_name,
    split_dim,
    table_dim,
)
from spdsl.runtime.tuning.footprint import KernelShape
from spdsl.runtime.tuning.gpu import gpu_of
from spdsl.runtime.tuning.search import searching, tuned_config
from spdsl.runtime.tuning.warps import without_repeats

Start = Callable[..., None]
"""What starts a kernel: (kernel, grid, *arguments, num_warps, num_stages, **constants)."""

# Kernels run on CUDA and ROCm tensors, and on CPU tensors under Triton's interpreter.
INTERPRETED = bool(triton.knobs.runtime.interpret)
KERNELS_ON_CPU = INTERPRETED

_start: Start | None = None  # of `launching`: of every thread, as a backward pass has one of its own
_own_start: ContextVar[Start | None] = ContextVar("spdsl start", default=None)  # of the module whose call is under way


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, num_stages: int, **constexprs: Any) -> None:
    """Starts a kernel; an empty grid is no launch, and on `meta`, where only shapes are asked, there is none either."""
    if min(grid) > 0 and (_start is not None or not _on_meta(args)):
        start = _start or _own_start.get() or with_triton
        start(kernel, grid, *args, num_warps=num_warps, num_stages=num_stages, **constexprs)


def _on_meta(args: tuple[Any, ...]) -> bool:
    first = _first_tensor(args)
    return first is not None and first.is_meta


def _first_tensor(args: tuple[Any, ...]) -> Tensor | None:
    """In tuples, too: all tensors of a launch lie on one device."""
    for x in args:
        found = x if isinstance(x, Tensor) else _first_tensor(x) if isinstance(x, tuple) else None
        if found is not None:
            return found
    return None


def with_triton(kernel: Any, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
    kernel[grid](*args, **named)


@contextmanager
def launching(start: Start) -> Iterator[None]:
    """Within it `start` gets every launch of the process, and CPU tensors take the kernels."""
    global _start, KERNELS_ON_CPU
    before, _start, KERNELS_ON_CPU = (_start, KERNELS_ON_CPU), start, True
    try:
        yield
    finally:
        _start, KERNELS_ON_CPU = before


@contextmanager
def started_by(start: Start) -> Iterator[None]:
    """Within it `start` gets the launches of this call."""
    token = _own_start.set(start)
    try:
        yield
    finally:
        _own_start.reset(token)


def uses_kernels(x: Tensor) -> bool:
    return x.device.type != "cpu" or KERNELS_ON_CPU


class Paged(NamedTuple):
    """Keys that lie in a cache: its page table (None: one piece per sequence), tokens per page (0) and capacity.

    spans: int32 [S, 2] = (0, entries), of a compressed stream.
    """

    table: Tensor | None
    page: int
    capacity: int
    spans: Tensor | None = None


def page_of(paged: Paged | None) -> int:
    return paged.page if paged is not None else 0


def config_for(
    kernel: str,
    q: Tensor,
    v_dim: int,
    paged: Paged | None = None,
    listed: bool = False,
    group: int = 1,
    most_n: int = 0,
    tables: Tables = TABLES,
) -> Config:
    """The configuration of `forward`, `dq`, `dkdv` or `decode` for these dims: tuned, or that of the tables.

    group: heads that are rows of one tile. A block of keys lies in one page, or each key in its own, and has at most
    `most_n` keys.
    """
    gpu, page = gpu_of(q.device), page_of(paged)
    dim = table_dim(kernel, q.shape[-1], v_dim)
    found = SMALL if INTERPRETED else lookup(kernel, gpu.architecture, dim, q.element_size(), tables)
    room = block_room(page)
    bound = min(room or most_n, most_n or room)
    found = found._replace(block_n=min(found.block_n, bound or found.block_n))
    if not INTERPRETED:
        shape = KernelShape(plain_name(kernel), q.shape[-1], v_dim, q.element_size(), group)
        found = without_repeats(shape, found, gpu.architecture)
    found = tuned_config(kernel, q, v_dim, gpu, group, bound, page > 0, listed, found)
    return chained(found, page, listed)


def decode_config(q: Tensor, v_dim: int, group: int, paged: Paged) -> Config:
    """As above, with the group's heads as rows."""
    return config_for("decode", q, v_dim, paged, group=group)._replace(block_m=max(16, triton.next_power_of_2(group)))


def scale_of(q: Tensor, layout: Layout) -> Any:
    """1 / sqrt(dim), a constant of kernels; or what the call says, which is an argument: no value is compiled anew.

    An argument is float32. For float64, which is there for the interpreter, that number is a constant, too.
    """
    if layout.scale is None:
        return tl.constexpr(q.shape[-1] ** -0.5)
    return tl.constexpr(layout.scale) if q.dtype == torch.float64 else layout.scale


def constants(
    q: Tensor,
    v_dim: int,
    scale: Any,
    config: Config,
    group: int = 1,
    splits: int = 1,
    page: int = 0,
    gathered: bool = False,
) -> Const:
    """The constants of a kernel; scale: that of the pattern, as a constant, or `scale_of` a call."""
    acc = tl.float64 if q.dtype == torch.float64 else tl.float32
    values = (
        q.shape[-1], *split_dim(q.shape[-1]), v_dim, *split_dim(v_dim), config.block_m, config.block_n,
        group, splits, page, gathered, None, acc, precision(q),
    )  # fmt: skip
    return Const(*(tl.constexpr(value) for value in values))._replace(SCALE=scale)


def precision(q: Tensor) -> str:
    """Of fp32 dots: three tf32 products on NVIDIA, which keep 21 bits; one where torch allows its 10 bits."""
    if q.dtype != torch.float32 or not gpu_of(q.device).architecture.startswith("sm_"):
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def strided(x: Tensor, sequences: int | None = None) -> Strided:
    """A tensor for a kernel. With `sequences`, a batch of 1 is shared by all of them."""
    batch = 0 if sequences is not None and x.shape[0] == 1 else x.stride(0)
    return Strided(x, batch, x.stride(1), x.stride(2))


def rows_contiguous(x: Tensor) -> Tensor:
    """Kernels take any strides but the last."""
    return x if x.stride(-1) == 1 else x.contiguous()


def room_like(x: Tensor) -> Tensor:
    """Memory in the shape of x whose last stride is 1, as kernels store: in the layout of x where that has it."""
    found = torch.empty_like(x)
    return found if found.stride(-1) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)


def is_step(q: Tensor, layout: Layout) -> bool:
    """Whether each sequence has one query: a step of decode."""
    return q.shape[2] == 1 and layout.q_spans is None


def empty_rows(q: Tensor, v_dim: int) -> tuple[Tensor, Tensor]:
    """Out and lse of rows without a key: 0 and -inf."""
    return q.new_zeros(*q.shape[:3], v_dim), q.new_full(q.shape[:3], -torch.inf, dtype=wide(q.dtype))


def split_room(q: Tensor, splits: int, v_dim: int) -> tuple[Tensor, Tensor]:
    """Room for the outs [B, Hq, splits, v_dim] and lses of a step in splits."""
    partial = torch.empty(*q.shape[:2], splits, v_dim, device=q.device, dtype=wide(q.dtype))
    return partial, partial.new_empty(*q.shape[:2], splits)


def gradient_room(q: Tensor, keys: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Zeros for dq and the (dk, dv) of each stream."""
    return room_like(q).zero_(), [(room_like(k).zero_(), room_like(v).zero_()) for k, v in keys]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of accumulators, lse and delta."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def source(q: Tensor, k: Tensor, v: Tensor, sequences: int, layout: Layout, paged: Paged | None) -> Source:
    """The keys of one stream for a kernel."""
    group = tl.constexpr(q.shape[1] // k.shape[1])
    k, v = rows_contiguous(k), rows_contiguous(v)
    if paged is None or paged.table is None:
        return Source(strided(k, sequences), strided(v, sequences), k.shape[2], layout.k_spans, None, 0, group)
    return Source(strided(k), strided(v), 0, layout.k_spans, paged.table, paged.table.stride(0), group)


def call_of(q: Tensor, layout: Layout) -> Call:
    # Without spans the host knows what answers; and what tuning compares and times is all of the work.
    leaves = tl.constexpr(layout.k_spans is not None and not searching())
    return Call(q.shape[2], layout.keys, layout.q_spans, layout.k_spans, layout.q_offset, layout.k_offset, leaves)


def delta_of(out: Tensor, dout: Tensor, dlse: Tensor | None) -> Tensor:
    """sum(out * dout) - dlse, [B, Hq, N]"""
    delta = out.new_empty(out.shape[:3], dtype=wide(out.dtype))
    rows = 64 if out.shape[3] <= 128 else 32  # 64 of 256 dims took registers to memory on sm_100
    config = Config(16 if INTERPRETED else rows, 16, 4, 1)
    launch(
        row_delta, (triton.cdiv(out.shape[2], config.block_m), out.shape[1], out.shape[0]),
        strided(rows_contiguous(out)), strided(dout), None if dlse is None else strided(dlse), strided(delta),
        out.shape[2],
        constants(out, out.shape[3], tl.constexpr(1.0), config),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return delta
