"""A small language model over bytes: embedding, layers of attention and SwiGLU behind RMS norms, logits."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.lm.attention import Attention, Module, Size

VOCABULARY = 256


class SwiGLU(nn.Module):
    """Feed-forward part (arXiv 2002.05202): silu(x A) * x B, then down."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.up(x).chunk(2, dim=-1)
        return self.down(functional.silu(left) * right)


class Layer(nn.Module):
    def __init__(self, size: Size, module: Module) -> None:
        super().__init__()
        self.before = nn.RMSNorm(size.width)
        self.attention = Attention(size, module)
        self.between = nn.RMSNorm(size.width)
        self.feed = SwiGLU(size.width, 2 * size.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        return x + self.feed(self.between(x))


class LanguageModel(nn.Module):
    """Bytes [batch, tokens] in, logits [batch, tokens, 256] out.

    Every weight is drawn from the seed and its own name, so that models with other attention begin alike in all
    that they share.
    """

    def __init__(self, size: Size, module: Module, seed: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, size.width)
        self.layers = nn.ModuleList(Layer(size, module) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.width)
        self.logits = nn.Linear(size.width, VOCABULARY, bias=False)
        self._draw(seed, size.layers)

    def forward(self, text: Tensor) -> Tensor:
        x = self.embedding(text)
        for layer in self.layers:
            x = layer(x)
        return self.logits(self.norm(x))

    def loss(self, text: Tensor) -> Tensor:
        """Mean cross entropy in nats per byte of every byte of `text` after the first, given those before it."""
        logits = self(text[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1).float(), text[:, 1:].flatten())

    def matrices(self) -> dict[str, nn.Parameter]:
        """The weights that are drawn, and decay: not the norms, nor what begins as a gate or a mean on purpose."""
        kinds = (nn.Linear, nn.Embedding)
        parts = {name: part for name, part in self.named_modules() if isinstance(part, kinds)}
        return {f"{name}.weight": part.weight for name, part in parts.items() if not name.endswith(".gate")}

    def _draw(self, seed: int, layers: int) -> None:
        for name, weight in self.matrices().items():
            # What is added to the hidden states is scaled down with the number of additions, as in GPT-2.
            added = name.endswith(("attention.out.weight", "feed.down.weight"))
            additions = 2 * layers if added else 1
            draw = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            nn.init.normal_(weight, std=(weight.shape[1] * additions) ** -0.5, generator=draw)
