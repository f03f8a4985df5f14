"""The modules under test and small arguments for them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import spdsl

PATTERNS = Path(__file__).resolve().parents[2] / "patterns"
# Windows and blocks that a few dozen tokens fill several times.
SMALL: dict[str, dict[str, int]] = {
    "causal": {},
    "document": {},
    "sink_attention": {"window": 7},
    "longformer": {"window": 5},
    "block_sparse": {"block": 16},
    "streaming_llm": {"sinks": 2, "window": 9},
}
GATED = """
pattern gated {
    causal
    near = attend(sliding(8))
    far  = attend(all)
    return gate(near, far)
}
"""


@cache
def module_of(name: str) -> ModuleType:
    return spdsl.load(PATTERNS / f"{name}.spat", **SMALL[name])


def arguments(module: ModuleType, tokens: int = 40, batch: int = 2, **sizes: Any) -> dict[str, Tensor]:
    """The module's example arguments: 4 query heads, 2 KV heads, head dims 16 and 24."""
    torch.manual_seed(tokens)
    shape = {"heads": 4, "kv_heads": 2, "qk_dim": 16, "v_dim": 24, **sizes}
    made: dict[str, Tensor] = module.example_inputs(batch, tokens, **shape)
    return made


def with_gradients(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies; queries, keys and values [B, H, N, D] ask for gradients."""
    return {name: x.clone().requires_grad_(x.dim() == 4 and x.is_floating_point()) for name, x in given.items()}


def gradients(module: ModuleType, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of the sum of squares of `attention`."""
    own = with_gradients(given)
    module.attention(**own).square().sum().backward()
    return {name: x.grad for name, x in own.items() if x.grad is not None}
