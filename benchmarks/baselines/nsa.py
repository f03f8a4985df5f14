"""Other packages that compute NSA, each by its public functions and only where it can be imported.

An adapter takes q, k, v [1, heads, tokens, dim] and lists [1, kv heads, tokens, count] (or None) and gives the call
and its tensors: what the layout asks for is done here, outside of the times. Known differences: fla compresses and
selects with one block size and asks for a group of 16 or a larger power of two; native_sparse_attention compresses by
a linear map and its window is flash_attn's; flash_nsa takes its own lists and its window is FlashAttention's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

NAMES = ("fla", "native_sparse_attention", "flash_nsa")
BRANCHES = ("coarse", "scored", "fine", "whole")

Call = Callable[..., Tensor]
Run = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Call, list[Tensor]]]


@dataclass(frozen=True)
class Sizes:
    heads: int
    kv_heads: int
    dim: int
    v_dim: int
    width: int
    stride: int
    block: int
    count: int
    window: int


def prepare(name: str, branch: str, sizes: Sizes) -> Run | None:
    """The adapter of a package for a branch; None if it is not there or has no such branch."""
    adapters = {"fla": _fla, "native_sparse_attention": _native, "flash_nsa": _flash}
    try:
        return adapters[name](branch, sizes)
    except ImportError:
        return None


def found() -> dict[str, str]:
    """The packages that can be imported, and their versions."""
    versions = {}
    for name in NAMES:
        try:
            versions[name] = str(getattr(import_module(name), "__version__", "installed"))
        except Exception as problem:  # a package may fail in any way while it is imported
            versions[name] = f"absent: {type(problem).__name__}"
    return versions


def tokens_first(x: Tensor) -> Tensor:
    """[1, heads, tokens, dim] -> [1, tokens, heads, dim]"""
    return x.transpose(1, 2).contiguous()


def _fla(branch: str, sizes: Sizes) -> Run | None:
    attend = import_module("fla.ops.nsa").parallel_nsa
    if branch not in ("fine", "whole"):
        return None

    def run(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor | None) -> tuple[Call, list[Tensor]]:
        gate = torch.ones(1, q.shape[2], sizes.heads, dtype=q.dtype, device=q.device)
        lists = None if chosen is None else tokens_first(chosen).long()
        gates = (None, gate, None) if branch == "fine" else (gate, gate, gate)
        window = 0 if branch == "fine" else sizes.window
        call = lambda q, k, v: attend(q, k, v, *gates, lists, sizes.count, sizes.block, window)  # noqa: E731
        return call, [tokens_first(x) for x in (q, k, v)]

    return run


def _native(branch: str, sizes: Sizes) -> Run | None:
    ops = import_module("native_sparse_attention.ops")
    if branch not in ("scored", "fine"):
        return None

    def run(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor | None) -> tuple[Call, list[Tensor]]:
        tokens = q.shape[2]
        starts = torch.tensor([0, tokens], dtype=torch.int32, device=q.device)
        if branch == "fine":
            assert chosen is not None
            lists = chosen[0].contiguous()
            call: Call = lambda q, k, v: ops.topk_sparse_attention(q, k, v, lists, sizes.block, starts)  # noqa: E731
            return call, [tokens_first(x)[0] for x in (q, k, v)]
        entries = (tokens - sizes.width) // sizes.stride + 1
        cells = torch.tensor([0, entries], dtype=torch.int32, device=q.device)
        made = [tokens_first(x[:, :, :entries])[0] for x in (k, v)]  # values do not matter for the time
        call = lambda q, k, v: ops.compressed_attention(  # noqa: E731
            q, k, v, sizes.width, sizes.stride, sizes.block, sizes.count, starts, cells, init_blocks=1, local_blocks=2
        )[0]
        return call, [tokens_first(q)[0], *made]

    return run


def _flash(branch: str, sizes: Sizes) -> Run | None:
    package = import_module("flash_nsa")
    if branch == "fine":
        return None  # it takes lists in a form of its own

    def run(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor | None) -> tuple[Call, list[Tensor]]:
        config = package.NSAConfig(
            head_dim=sizes.v_dim, qk_head_dim=sizes.dim, v_head_dim=sizes.v_dim, num_heads=sizes.heads,
            num_kv_heads=sizes.kv_heads, kernel_size=sizes.width, stride=sizes.stride, block_size=sizes.block,
            top_n=sizes.count, num_init_blocks=1, num_local_blocks=2, window_size=sizes.window,
        )  # fmt: skip
        core = package.HFNSACore(config)
        starts = torch.tensor([0, q.shape[2]], dtype=torch.int32, device=q.device)
        package.NSAHelper.init_cu_seqlens(starts)
        rows = [tokens_first(x)[0] for x in (q, k, v)]
        if branch == "whole":
            gates = torch.zeros(q.shape[2], sizes.heads, 3, dtype=q.dtype, device=q.device)
            return lambda q, k, v, gates: core(q, k, v, gates, starts), [*rows, gates]
        scale = sizes.dim**-0.5
        made = [pooled.detach() for pooled in (core.compress_k(rows[1]), core.compress_v(rows[2]))]

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out, lse = package.compress_attn(q, k, v, sm_scale=scale)
            if branch == "scored":
                package.slc_topk_indices(q, k, lse, sm_scale=scale, maybe_efficient_version=True)
            return out

        return call, [rows[0], *made]

    return run
