"""The attention of one layer: PyTorch's own, or that of a generated module."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from examples.llama.model import Attention, Size

PAGE = 64  # tokens of a page: copies of a cache share them


@dataclass
class Dense:
    """PyTorch's own causal attention over all keys so far."""

    k: Tensor | None = None
    v: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        before = 0 if self.k is None else self.k.shape[2]
        if self.k is not None and self.v is not None:
            k, v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
        self.k, self.v = k, v
        if before == 0:
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(before)
        return scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)

    def copies(self, number: int) -> Dense:
        if self.k is None or self.v is None:
            return Dense()
        return Dense(self.k.expand(number, -1, -1, -1), self.v.expand(number, -1, -1, -1))


class Generated:
    """`prefill` and `decode` of a module, on its own cache."""

    def __init__(self, module: ModuleType, size: Size, capacity: int, cache: Any = None) -> None:
        self.module, self.size, self.capacity = module, size, capacity
        dims = {"kv_heads": size.kv_heads, "qk_dim": size.dim, "v_dim": size.dim}
        self.cache = cache or module.Cache(1, capacity, **dims, page=PAGE, dtype=torch.float32)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        step = self.module.decode if q.shape[2] == 1 else self.module.prefill
        out: Tensor = step(q, k, v, self.cache)
        return out

    def copies(self, number: int) -> Generated:
        cache = copy.deepcopy(self.cache)
        cache.select([0] * number)
        return Generated(self.module, self.size, self.capacity, cache)


@dataclass
class Stepwise:
    """Prefills all but the last tokens of a call and decodes those one by one, on a copy of a layer's cache.

    The tokens are known, so a layer can take all of them before the next layer begins, and only one layer's copies are
    there at a time: what each step sees is what it would see token by token through all layers.
    """

    layer: Attention
    steps: int
    sequences: int = 1
    kept: bool = False
    """Whether the cache of the prompt stays, in `layer`; else the copy ends with the call."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        prompt = q.shape[2] - self.steps
        attend = self.layer if self.kept else self.layer.copies(self.sequences)
        outs = [attend(*(x[:, :, :prompt] for x in (q, k, v)))]
        attend = self.layer.copies(1) if self.kept else attend
        outs += [attend(*(x[:, :, t : t + 1] for x in (q, k, v))) for t in range(prompt, q.shape[2])]
        return torch.cat(outs, 2)

    def copies(self, number: int) -> Stepwise:
        return Stepwise(self.layer, self.steps, number)
