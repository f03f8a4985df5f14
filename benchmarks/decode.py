"""One step of generation over a full cache on the CPU, against dense attention over K and V in one piece."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import spdsl
from benchmarks import cases
from benchmarks.workload import Workload

CHUNK = 4096  # tokens appended at once


def measure(contender: str, work: Workload, tokens: int, page: int | None) -> dict[str, Any]:
    import torch

    q, k, v, _ = cases.inputs(work, tokens)
    q = q[:, :, -1:]
    if contender == "sdpa":
        attend = torch.nn.functional.scaled_dot_product_attention
        call: Any = partial(attend, q, k, v)
        prepare_s = 0.0
    else:
        prepare_s, call = cases.timed(lambda: step_of(q, k, v, page))
    first_s, out = cases.timed(call)
    want = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    result = {"prepare_s": prepare_s, "first_s": first_s, "error": (out - want).abs().max().item()}
    return result | cases.steady(call, first_s, replace(work, repeats=10 * work.repeats))


def step_of(q: Any, k: Any, v: Any, page: int | None) -> Any:
    """A call that decodes the last token again and again; all others are in the cache."""
    module: Any = spdsl.load("patterns/causal.spat")
    tokens = k.shape[2]
    cache = module.Cache(1, tokens, kv_heads=k.shape[1], qk_dim=k.shape[3], v_dim=v.shape[3], page=page)
    for first in range(0, tokens - 1, CHUNK):
        own = slice(first, min(first + CHUNK, tokens - 1))
        cache.append_tokens({"kv": k[:, :, own]}, {"kv": v[:, :, own]}, {})

    def step() -> Any:
        cache.lengths.fill_(tokens - 1)
        cache.at_least = tokens - 1
        return module.decode(q, k[:, :, -1:], v[:, :, -1:], cache)

    return step
