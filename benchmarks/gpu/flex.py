"""FlexAttention with the masks of our patterns. The block mask is built from rows of the mask, outside the times."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from benchmarks.gpu.patterns import Case, Inputs

BLOCK = 128
Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def prepare(module: ModuleType, case: Case, given: Inputs) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    torch._dynamo.reset()  # every case compiles for its own shapes
    visible = mask_of(case["pattern"], module.PARAMS, given)
    heads = case["heads"] if "tiles" in given else 1
    mask = block_mask(visible, heads, given["q"].shape[2], given["q"].device)
    score = bias_of(given) if "slope" in given else None
    attend = torch.compile(flex_attention, dynamic=False)
    return partial(attend, score_mod=score, block_mask=mask, enable_gqa=True)


def mask_of(name: str, params: dict[str, Any], given: Inputs) -> Mask:
    """The element test of a pattern, as FlexAttention writes it."""
    if name in ("causal", "alibi"):
        return lambda b, h, q, k: k <= q
    if name == "sliding_window":
        window = params["window"]
        return lambda b, h, q, k: (k <= q) & (q - k < window)
    if name == "streaming_llm":
        window, sinks = params["window"], params["sinks"]
        return lambda b, h, q, k: (k <= q) & ((q - k < window) | (k < sinks))
    if name == "document":
        doc = given["doc"][0].contiguous()
        return lambda b, h, q, k: (k <= q) & (doc[q] == doc[k])
    if name == "prefix_lm":
        prefix = given["prefix"]
        return lambda b, h, q, k: (k < prefix) | (k <= q)
    if name == "block_sparse":
        return _listed(given, params["block"])
    raise ValueError(f"no mask of FlexAttention for {name}")


def _listed(given: Inputs, block: int) -> Mask:
    lists = given["tiles"][0].long()
    units = -(-given["k"].shape[2] // block)
    member = torch.zeros(*lists.shape[:2], units, dtype=torch.bool, device=lists.device).scatter_(2, lists, True)
    return lambda b, h, q, k: member[h, q // block, k // block]


def bias_of(given: Inputs) -> Callable[..., Tensor]:
    slope = given["slope"]

    def score(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return s - slope[h] * (q - k)

    return score


def block_mask(visible: Mask, heads: int, tokens: int, device: torch.device) -> BlockMask:
    """The block mask of `create_block_mask`, made from one row of blocks at a time: no tokens^2 buffer."""
    count = -(-tokens // BLOCK)
    some, full = (torch.zeros(1, heads, count, count, dtype=torch.bool, device=device) for _ in range(2))
    b = torch.zeros((), dtype=torch.int64, device=device)
    k = torch.arange(tokens, device=device).view(1, 1, -1)
    for h in range(heads):
        for row in range(count):
            q = torch.arange(row * BLOCK, min((row + 1) * BLOCK, tokens), device=device).view(1, -1, 1)
            seen = visible(b, torch.tensor(h, device=device), q, k).expand(1, q.shape[1], tokens)[0]
            keys = torch.nn.functional.pad(seen.sum(0), (0, count * BLOCK - tokens)).view(count, BLOCK).sum(1)
            some[0, h, row], full[0, h, row] = keys > 0, keys == BLOCK * BLOCK
    return BlockMask.from_kv_blocks(*_ordered(some & ~full), *_ordered(full), BLOCK_SIZE=BLOCK, mask_mod=visible,
                                    seq_lengths=(tokens, tokens))  # fmt: skip


def _ordered(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row, and their numbers first."""
    return chosen.sum(-1).int(), torch.argsort(chosen.int(), dim=-1, descending=True, stable=True).int()
