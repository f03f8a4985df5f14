"""fla-core, fla/ops/nsa: pointers, one query a program, gathered queries for dK/dV; dims padded to powers of two."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

from benchmarks.static.peers.cases import BLOCK, COUNT, EQUAL, HEADS, KV_HEADS, PAPER, TOKENS, Case, absent, bare
from spdsl.runtime.tuning.configs import power_of_2

NAME, FOLDER = "fla", "fla"
FILE = "fla/ops/nsa/parallel.py"
# Of its configurations the one of the recorded figures, and in dK/dV 4 queries of 16 heads: 64 rows.
CONFIG = {"num_warps": 4, "num_stages": 1}
GATHERED = CONFIG | {"BQ": 4}


def cases(root: Path) -> Iterator[Case]:
    absent("einops", "rearrange", "repeat", "reduce")
    for name in ("fla", "fla.ops", "fla.ops.nsa", "fla.ops.attn"):
        bare(name, root.joinpath(*name.split(".")))
    for dims in (PAPER, EQUAL):
        yield from _selected(dims)


def _selected(dims: tuple[int, int]) -> Iterator[Case]:
    ops = importlib.import_module("fla.ops.nsa.parallel")
    (qk, v), (wide, wide_v) = dims, (power_of_2(dims[0]), power_of_2(dims[1]))
    q, k, values, out = (torch.zeros(1, TOKENS, h, d, dtype=torch.bfloat16) for h, d in (
        (HEADS, qk), (KV_HEADS, qk), (KV_HEADS, v), (HEADS, v)
    ))  # fmt: skip
    chosen, lse = torch.zeros(1, TOKENS, KV_HEADS, COUNT, dtype=torch.int32), torch.zeros(1, TOKENS, HEADS)

    def forward() -> object:
        with mock.patch.object(ops, "check_shared_mem", return_value=True):  # as on Hopper; it asks for a GPU by number
            return ops.parallel_nsa_fwd(q, k, values, chosen, COUNT, BLOCK, 0.1)

    def backward() -> object:
        return ops.parallel_nsa_bwd(q, k, values, out, lse, out, chosen, COUNT, BLOCK, 0.1)

    kernel = "parallel_nsa_{}".format
    one = {"gathers": True, "config": CONFIG}
    yield Case(kernel("fwd_kernel"), "fine_forward", dims, wide + wide_v, forward, **one)
    yield Case(kernel("bwd_kernel_dq"), "fine_dq", dims, 2 * wide + wide_v, backward, **one)
    yield Case(
        kernel("bwd_kernel_dkv"), "fine_dkdv", dims, 2 * (wide + wide_v), backward,
        gathers=True, config=GATHERED,
    )  # fmt: skip
