"""XunhaoLai/native-sparse-attention-triton: pointers, one query a program, gathered queries for dK/dV; one head dim."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

from benchmarks.static.peers.cases import (
    BLOCK,
    COUNT,
    ENTRIES,
    EQUAL,
    HEADS,
    KV_HEADS,
    STRIDE,
    TOKENS,
    WIDTH,
    Case,
    bare,
    ends,
    rows,
)

NAME, FOLDER = "XunhaoLai", "native_sparse_attention"
FILE = "native_sparse_attention/ops/triton/topk_sparse_attention.py"
SCALE = 0.1


def cases(root: Path) -> Iterator[Case]:
    path = root / "native_sparse_attention"
    bare("native_sparse_attention", path)
    bare("native_sparse_attention.ops", path / "ops")
    bare("native_sparse_attention.ops.triton", path / "ops" / "triton")
    yield from _selected()
    yield from _compressed()


def _selected() -> Iterator[Case]:
    qk, v = EQUAL
    ops = importlib.import_module("native_sparse_attention.ops.triton.topk_sparse_attention")
    q, k, values, out = rows(HEADS, qk), rows(KV_HEADS, qk), rows(KV_HEADS, v), rows(HEADS, v)
    chosen, lse = torch.zeros(KV_HEADS, TOKENS, COUNT, dtype=torch.int32), torch.zeros(HEADS, TOKENS)
    last = (BLOCK, ends(), ends(), TOKENS, TOKENS, SCALE)

    def forward() -> object:
        return ops._topk_sparse_attention_fwd(q, k, values, chosen, *last)

    def backward() -> object:
        lists = torch.zeros(KV_HEADS, TOKENS * COUNT, dtype=torch.int32)  # by kernels, from counts that nobody computed
        with mock.patch.object(ops, "reorder_topk_idx", return_value=lists):
            return ops._topk_sparse_attention_bwd(out, out, lse, q, k, values, chosen, *last)

    yield Case("forward_kernel", "fine_forward", EQUAL, qk + v, forward, gathers=True)
    yield Case("backward_dq", "fine_dq", EQUAL, 2 * qk + v, backward, gathers=True)
    yield Case("backward_dkdv", "fine_dkdv", EQUAL, 2 * (qk + v), backward, gathers=True)


def _compressed() -> Iterator[Case]:
    qk, v = EQUAL
    ops = importlib.import_module("native_sparse_attention.ops.triton.compressed_attention")
    q, k, values, out = rows(HEADS, qk), rows(KV_HEADS, qk, ENTRIES), rows(KV_HEADS, v, ENTRIES), rows(HEADS, v)
    lse = torch.zeros(HEADS, TOKENS)
    last = (WIDTH, STRIDE, ends(), ends(ENTRIES), TOKENS, ENTRIES, SCALE)

    def forward() -> object:
        return ops._compressed_attention_fwd(q, k, values, *last)

    def backward() -> object:
        return ops._compressed_attention_bwd(out, out, lse, q, k, values, *last)

    def score() -> object:
        return ops._get_attention_score(q, k, lse, *last)

    yield Case("forward_kernel", "coarse_forward", EQUAL, qk + v, forward)
    yield Case("backward_dq", "coarse_dq", EQUAL, 2 * qk + v, backward)
    yield Case("backward_dkdv", "coarse_dkdv", EQUAL, 2 * (qk + v), backward)
    yield Case("score_kernel", "chosen_select", EQUAL, qk, score)
