"""A small language model over bytes whose attention is handed in.

Attention is an argument of the forward pass, one function (q, k, v) -> out per layer, so that the same weights
run with dense attention, with a generated module's `attention`, or with its `prefill` and `decode` on a cache.
Shapes: q [batch, query heads, tokens, head dim], k and v [batch, kv heads, tokens, head dim].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = 256
ROTARY_BASE = 10_000.0  # RoFormer (arXiv 2104.09864)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Size:
    """The shape of a model; `length` is the training context in bytes."""

    layers: int = 2
    query_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    length: int = 512

    @property
    def width(self) -> int:
        return self.query_heads * self.head_dim


def rotate(x: Tensor, start: int) -> Tensor:
    """Rotary positions start, start + 1, ... on x [batch, heads, tokens, head dim]; pairs are (i, i + half)."""
    half = x.shape[-1] // 2
    rate = ROTARY_BASE ** -(torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.arange(start, start + x.shape[-2], device=x.device)[:, None] * rate
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


class Layer(nn.Module):
    """Attention and a feed-forward part, each behind an RMS norm."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.before = nn.RMSNorm(size.width)
        self.qkv = nn.Linear(size.width, (size.query_heads + 2 * size.kv_heads) * size.head_dim, bias=False)
        self.out = nn.Linear(size.width, size.width, bias=False)
        self.feed = nn.Sequential(
            nn.RMSNorm(size.width),
            nn.Linear(size.width, 4 * size.width, bias=False),
            nn.GELU(),
            nn.Linear(4 * size.width, size.width, bias=False),
        )

    def forward(self, x: Tensor, attend: Attend, start: int) -> Tensor:
        x = x + self.out(self._mix(self.before(x), attend, start))
        fed: Tensor = self.feed(x)
        return x + fed

    def _mix(self, x: Tensor, attend: Attend, start: int) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, self.size.head_dim)).transpose(1, 2)
        q, k, v = heads.split((self.size.query_heads, self.size.kv_heads, self.size.kv_heads), dim=1)
        return attend(rotate(q, start), rotate(k, start), v).transpose(1, 2).flatten(-2)


class ByteLM(nn.Module):
    """Bytes [batch, tokens] in, logits [batch, tokens, 256] out."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.embedding = nn.Embedding(VOCABULARY, size.width)
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.width)
        self.logits = nn.Linear(size.width, VOCABULARY, bias=False)

    def forward(self, text: Tensor, attends: Sequence[Attend], start: int = 0) -> Tensor:
        """`attends` has one function per layer; `start` is the position of the first byte of `text`."""
        x: Tensor = self.embedding(text)
        for layer, attend in zip(self.layers, attends, strict=True):
            x = layer(x, attend, start)
        logits: Tensor = self.logits(self.norm(x))
        return logits

    def loss(self, text: Tensor, attend: Attend) -> Tensor:
        """Mean cross entropy in nats per byte of every byte of `text` after the first, given those before it."""
        logits = self(text[:, :-1], [attend] * self.size.layers)
        return functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over all keys, PyTorch's own."""
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
