"""A small Llama whose attention is handed in: one object per layer, which keeps what the layer has seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Size:
    """As the file of a model says it."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    rotary_base: float
    epsilon: float  # of the RMS norms

    @property
    def dim(self) -> int:
        return self.width // self.heads


class Attention(Protocol):
    """One layer: its cache, and how new tokens see it."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Appends k and v [batch, kv heads, tokens, dim] and answers q [batch, heads, tokens, dim], rotated both."""

    def copies(self, number: int) -> Attention:
        """So many sequences that go on from the one here, which stays as it is."""


Weights = dict[str, Tensor]  # by the names of GGUF: blk.0.attn_q.weight [out, in]
Seen = Callable[[int, Tensor, Tensor, Tensor], None]  # layer, q, k, v


@dataclass(frozen=True)
class Llama:
    size: Size
    weights: Weights

    @torch.no_grad()
    def __call__(
        self, tokens: Tensor, attention: Sequence[Attention], start: int, last: int = 1, seen: Seen | None = None
    ) -> Tensor:
        """Log-probabilities of what follows the `last` tokens of int64 [batch, tokens], which begin at `start`."""
        x = self.weights["token_embd.weight"][tokens]
        turns = rotations(self.size, start, tokens.shape[1])
        for layer, attend in enumerate(attention):
            x = x + self._attended(layer, x, turns, attend, seen)
            x = x + self._fed(layer, x)
        x = self._normed("output_norm", x[:, -last:])
        head = self.weights.get("output.weight", self.weights["token_embd.weight"])  # one matrix for both
        return torch.log_softmax(functional.linear(x, head), -1)

    def _attended(self, layer: int, x: Tensor, turns: Tensor, attend: Attention, seen: Seen | None) -> Tensor:
        x = self._normed(f"blk.{layer}.attn_norm", x)
        q, k, v = (self._heads(layer, side, x) for side in "qkv")
        q, k = rotated(q, turns), rotated(k, turns)
        if seen is not None:
            seen(layer, q, k, v)
        return self._linear(f"blk.{layer}.attn_output", attend(q, k, v).transpose(1, 2).flatten(2))

    def _heads(self, layer: int, side: str, x: Tensor) -> Tensor:
        return self._linear(f"blk.{layer}.attn_{side}", x).unflatten(-1, (-1, self.size.dim)).transpose(1, 2)

    def _fed(self, layer: int, x: Tensor) -> Tensor:
        x = self._normed(f"blk.{layer}.ffn_norm", x)
        gate = functional.silu(self._linear(f"blk.{layer}.ffn_gate", x))
        return self._linear(f"blk.{layer}.ffn_down", gate * self._linear(f"blk.{layer}.ffn_up", x))

    def _normed(self, name: str, x: Tensor) -> Tensor:
        return functional.rms_norm(x, (self.size.width,), self.weights[f"{name}.weight"], self.size.epsilon)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(x, self.weights[f"{name}.weight"])


def rotations(size: Size, start: int, tokens: int) -> Tensor:
    """Complex turns of positions start, start + 1, ... [tokens, dim / 2]."""
    half = torch.arange(size.dim // 2, dtype=torch.float64)
    angle = torch.arange(start, start + tokens)[:, None] * size.rotary_base ** (-2 * half / size.dim)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def rotated(x: Tensor, turns: Tensor) -> Tensor:
    """Pairs are neighbours (2 i, 2 i + 1), as GGUF lays out the rows of Llama's projections."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns).flatten(-2)
