"""mdy666/Scalable-Flash-Native-Sparse-Attention: descriptors, one query a program, gathered queries for dK/dV."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from packaging.version import parse

from benchmarks.static.peers.cases import (
    COUNT,
    ENTRIES,
    EQUAL,
    HEADS,
    KV_HEADS,
    PAPER,
    TOKENS,
    Case,
    bare,
    ends,
    rows,
)

NAME, FOLDER = "mdy666", "flash_nsa"
FILE = "flash_nsa/ops/select_attn.py"


def cases(root: Path) -> Iterator[Case]:
    bare("flash_nsa", root / "flash_nsa")
    if "pkg_resources" not in sys.modules:  # setuptools has it no more; only versions are compared
        resources = ModuleType("pkg_resources")
        resources.parse_version = parse  # type: ignore[attr-defined]
        sys.modules["pkg_resources"] = resources
    for dims in (PAPER, EQUAL):
        yield from _selected(dims)
        yield from _compressed(dims)


def _selected(dims: tuple[int, int]) -> Iterator[Case]:
    qk, v = dims
    ops = importlib.import_module("flash_nsa.ops.select_attn")
    q, k, values = rows(HEADS, qk), rows(KV_HEADS, qk), rows(KV_HEADS, v)
    chosen, out, lse = (
        torch.zeros(KV_HEADS, TOKENS, COUNT, dtype=torch.int32),
        rows(HEADS, v),
        torch.zeros(TOKENS, HEADS),
    )

    def forward() -> object:
        _begin()
        return ops.slc_attn_fwd(q, k, values, chosen)

    def backward() -> object:  # as its autograd function calls it
        _begin()
        return ops.slc_attn_bwd(q, k, values, chosen, out, lse, rows(HEADS, v), dkdv_repeat=False)

    yield Case("_fwd_kernel", "fine_forward", dims, qk + v, forward, gathers=True)
    yield Case("_dq_kernel", "fine_dq", dims, 2 * qk + v, backward, gathers=True)
    yield Case("_dkdv_kernel", "fine_dkdv", dims, 2 * (qk + v), backward, gathers=True)


def _compressed(dims: tuple[int, int]) -> Iterator[Case]:
    qk, v = dims
    ops, topk = (importlib.import_module(f"flash_nsa.ops.{name}") for name in ("compress_attn", "topk"))
    q, k, values = rows(HEADS, qk), rows(KV_HEADS, qk, ENTRIES), rows(KV_HEADS, v, ENTRIES)
    out, lse = rows(HEADS, v), torch.zeros(HEADS, TOKENS)

    def forward() -> object:
        _begin()
        return ops.cmp_attn_fwd(q, k, values)

    def backward() -> object:
        _begin()
        return ops.cmp_attn_bwd(q, k, values, out, lse, rows(HEADS, v))

    def score() -> object:
        _begin()
        return topk.slc_topk_indices_for_32_16_64(q, k, lse)

    yield Case("_cmp_fwd_kernel", "coarse_forward", dims, qk + v, forward)
    yield Case("_cmp_dq_kernel", "coarse_dq", dims, 2 * qk + v, backward)
    yield Case("_cmp_dkdv_kernel", "coarse_dkdv", dims, 2 * (qk + v), backward)
    # The entry before each unit is multiplied once more: 5 products for 4 entries. Lists are made by another kernel.
    yield Case("_slc_probs_kernel", "chosen_select", dims, qk * 5 // 4, score)


def _begin() -> None:
    helper = importlib.import_module("flash_nsa.utils").NSAHelper
    helper.init_cu_seqlens(ends())
