"""FlexAttention, compiled, with a block mask that a compiled `create_block_mask` builds."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.baselines import Attend
from benchmarks.workload import Workload


@cache
def compiled() -> tuple[Any, Any]:
    return torch.compile(create_block_mask), torch.compile(flex_attention)


def prepare(workload: Workload, tokens: int) -> Attend:
    window, sinks = workload.window, workload.sinks

    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & ((i - j < window) | (j < sinks))

    build, attend = compiled()
    mask = build(visible, None, None, tokens, tokens, device="cpu")
    return partial(attend, block_mask=mask, scale=workload.scale)
