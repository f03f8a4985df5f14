"""Dense causal attention of PyTorch: more work than the pattern asks for, and what most code calls."""

from __future__ import annotations

from functools import partial

from torch.nn.functional import scaled_dot_product_attention

from benchmarks.baselines import Attend
from benchmarks.workload import Workload


def prepare(workload: Workload, tokens: int) -> Attend:
    return partial(scaled_dot_product_attention, is_causal=True, scale=workload.scale)
