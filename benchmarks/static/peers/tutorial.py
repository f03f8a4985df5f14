"""Triton's tutorial 06, fused attention: dense and causal, tensor descriptors, fp16."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.static.peers.cases import EQUAL, TOKENS, Case

NAME, FOLDER = "tutorial 06", "python/tutorials"
FILE = "python/tutorials/06-fused-attention.py"
CONFIG = {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2}


def cases(root: Path) -> Iterator[Case]:
    spec = importlib.util.spec_from_file_location("tutorial_06", root / FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    q, k, v = (torch.zeros(1, 8, TOKENS, EQUAL[0], dtype=torch.float16) for _ in range(3))

    def forward() -> object:
        return module.attention(q, k, v, True, 0.1, False)

    yield Case(
        "_attn_fwd", "attend_forward", EQUAL, sum(EQUAL), forward, config=CONFIG, pattern="causal",
        dtype="fp16", heads=(8, 8),
    )  # fmt: skip
