"""One pattern on one context: loss of its tail, needles that are found, and what the pattern leaves out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import spdsl
from examples.llama.attention import Dense, Generated, Stepwise
from examples.llama.model import Attention, Llama
from examples.llama.text import DEPTHS, EACH, Context

PATTERNS = Path(__file__).resolve().parents[2] / "patterns"
LAYERS = (2, 15, 28)  # whose q, k, v are kept
QUERIES = 64  # last ones of the context that a diagnosis looks at

Tick = Callable[[], None]


@dataclass(frozen=True)
class Entry:
    """A line of the table: a file of patterns/, or None for PyTorch's own attention."""

    name: str
    file: str | None = None
    params: Mapping[str, float] = field(default_factory=dict)
    dense_layers: int = 0
    """First layers that the publication leaves dense."""
    longest: int | None = None
    """Tokens up to which a full run takes it, where a step takes long on the CPU path."""

    @property
    def title(self) -> str:
        return " ".join([self.name, *(f"{name}={value}" for name, value in self.params.items())])

    def source(self) -> str:
        """Without the heads and dims of the published model: SmolLM2 has its own."""
        assert self.file is not None
        text = (PATTERNS / f"{self.file}.spat").read_text(encoding="utf-8")
        return re.sub(r"^[ \t]*(heads|dim)\b.*$", "", text, flags=re.MULTILINE)

    def module(self) -> ModuleType | None:
        return None if self.file is None else spdsl.load(self.source(), **self.params)


@dataclass(frozen=True)
class Answered:
    """logs: of each token of the tail, natural logarithms [tail]; found: of each needle."""

    logs: Tensor
    found: list[bool]
    vectors: dict[str, Tensor]
    """layers.<i>.q of the last QUERIES queries, layers.<i>.k and v of all tokens."""

    @property
    def loss(self) -> float:
        return -self.logs.mean().item()

    @property
    def by_depth(self) -> list[int]:
        """Needles found, of EACH at each depth, the first one at the beginning."""
        return [sum(self.found[depth * EACH : (depth + 1) * EACH]) for depth in range(DEPTHS)]


def layers_of(entry: Entry, model: Llama, capacity: int) -> list[Attention]:
    module = entry.module()
    return [
        Dense() if module is None or layer < entry.dense_layers else Generated(module, model.size, capacity)
        for layer in range(model.size.layers)
    ]


def answer(entry: Entry, model: Llama, given: Context, tick: Tick) -> Answered:
    """The tail is decoded token by token after the prompt, the answers after their questions on copies of its cache."""
    layers = layers_of(entry, model, len(given.prompt) + len(given.tail) + 64)
    vectors: dict[str, Tensor] = {}

    def seen(layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        tick()
        if layer in LAYERS and q.shape[0] == 1:
            vectors.update({f"layers.{layer}.q": q[:, :, -QUERIES:].contiguous(), f"layers.{layer}.k": k.contiguous()})
            vectors[f"layers.{layer}.v"] = v.contiguous()

    tail = torch.tensor(given.tail)
    tokens = torch.tensor([*given.prompt, *given.tail[:-1]])[None]
    steps = [Stepwise(layer, len(tail) - 1, kept=True) for layer in layers]
    after = model(tokens, steps, 0, last=len(tail), seen=seen)[0]
    logs = after.gather(1, tail[:, None])[:, 0]
    return Answered(logs, _found(model, layers, given, seen), vectors)


def _found(model: Llama, layers: Sequence[Attention], given: Context, seen: Any) -> list[bool]:
    """Whether the likeliest tokens are the answer's, each after those before it."""
    answers = torch.tensor(given.answers)
    asked = torch.cat([torch.tensor(given.questions), answers[:, :-1]], 1)
    digits = answers.shape[1]
    steps = [Stepwise(layer, digits - 1, len(answers)) for layer in layers]
    logs = model(asked, steps, len(given.prompt), last=digits, seen=seen)
    found: list[bool] = (logs.argmax(-1) == answers).all(1).tolist()
    return found


def left_out(entry: Entry, vectors: Mapping[str, Tensor]) -> dict[str, float]:
    """Means over layers and heads: sparsity, mass kept, critical keys missed, at the last queries."""
    if entry.file is None:
        return {"sparsity": 0.0, "kept": 1.0, "missed": 0.0}
    found = spdsl.diagnose(entry.source(), vectors, phase="decode", **entry.params)
    mean = found.to_json()["mean"]
    return {name: mean[name] for name in ("sparsity", "kept", "missed")}
