"""A layer of attention for any pattern: it asks the generated module which arguments it takes, and makes them.

Every stream gets projections of K and V of its own, every `gate` its gates, every compressed stream its weights.
What depends on the text, such as document numbers or given lists, cannot be made from hidden states and is refused.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

ROTARY_BASE = 10_000.0  # RoFormer (arXiv 2104.09864)
# The last part of the name of a compressed stream's weight, and its axes.
ROLES = {
    "position": ("heads", "width", "dim"),
    "weight": ("heads", "width"),
    "up": ("heads", "width", "dim", "hidden"),
    "down": ("heads", "hidden", "dim"),
}
SUPPORTED = "a pattern may take queries, streams, gates and the weights of compressed streams here"


class Made(Protocol):
    """What a module was made from."""

    namespace: str  # of its operators: pattern and digest


class Module(Protocol):
    """What a generated module offers to this layer."""

    MODULE: Made
    PARAMS: dict[str, float]
    attention: Callable[..., Tensor]
    example_inputs: Callable[..., dict[str, Tensor]]


class Dense:
    """Causal attention over all keys, PyTorch's own, as if it were a generated module."""

    MODULE = SimpleNamespace(namespace="torch")
    PARAMS: dict[str, float] = {}  # noqa: RUF012 (the form of a generated module)

    @staticmethod
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    @staticmethod
    def example_inputs(
        batch: int, tokens: int, *, heads: int, kv_heads: int, qk_dim: int, v_dim: int
    ) -> dict[str, Tensor]:
        shapes = {"q": (heads, qk_dim), "k": (kv_heads, qk_dim), "v": (kv_heads, v_dim)}
        return {name: torch.zeros(batch, count, tokens, dim) for name, (count, dim) in shapes.items()}


@dataclass(frozen=True)
class Size:
    """The shape of a model; the width of its hidden states is query heads x head dim."""

    layers: int = 3
    query_heads: int = 8
    kv_heads: int = 2
    head_dim: int = 32

    @property
    def width(self) -> int:
        return self.query_heads * self.head_dim


@dataclass(frozen=True)
class Vectors:
    """An argument [batch, heads, tokens, dim] that is a projection of the hidden states."""

    name: str
    heads: int
    dim: int

    @property
    def rotated(self) -> bool:
        """Queries and keys carry their position, values do not."""
        return self.name != "v" and not self.name.startswith("v_")


@dataclass(frozen=True)
class Arguments:
    """What `attention` of a module wants: vectors, gates of so many branches (0: none), weights by name and shape."""

    vectors: tuple[Vectors, ...]
    branches: int
    weights: dict[str, tuple[int, ...]]


def arguments(module: Module, size: Size) -> Arguments:
    """Reads names from the signature and shapes from two sets of examples: axes that differ are batch and tokens."""
    heads = {"heads": size.query_heads, "kv_heads": size.kv_heads, "qk_dim": size.head_dim, "v_dim": size.head_dim}
    first, second = (module.example_inputs(batch, 128 * batch, **heads) for batch in (1, 2))
    vectors, branches, weights = [], 0, {}
    for name in required(module.attention):
        if name not in first:
            raise ValueError(f"`{name}` is not among the module's example inputs, so its shape is not known")
        shape = tuple(first[name].shape)
        growing = tuple(axis for axis, length in enumerate(second[name].shape) if length != shape[axis])
        if name == "gates":
            branches = shape[-1]
        elif growing == (0, 2) and len(shape) == 4 and first[name].is_floating_point():
            vectors.append(Vectors(name, shape[1], shape[3]))
        elif not growing and len(ROLES.get(role(name), ())) == len(shape):
            weights[name] = shape
        else:
            kind = str(first[name].dtype).removeprefix("torch.")
            raise ValueError(f"`{name}`, {kind} {list(shape)}, cannot be made from hidden states; {SUPPORTED}")
    return Arguments(tuple(vectors), branches, weights)


def required(function: Callable[..., Tensor]) -> list[str]:
    """The names of the arguments without a default: an optional one is a choice, which the module makes itself."""
    known = inspect.signature(function).parameters.values()
    return [one.name for one in known if one.kind is one.POSITIONAL_OR_KEYWORD and one.default is one.empty]


def role(name: str) -> str:
    return name.rpartition("_")[2]


class Attention(nn.Module):
    """Hidden states [batch, tokens, width] to the same, with `module.attention` in the middle."""

    def __init__(self, size: Size, module: Module) -> None:
        super().__init__()
        wanted = arguments(module, size)
        self.attend = module.attention
        self.vectors = wanted.vectors
        self.heads = (size.query_heads, wanted.branches)
        self.project = nn.ModuleDict(
            {one.name: nn.Linear(size.width, one.heads * one.dim, bias=False) for one in self.vectors}
        )
        self.gate = gate_layer(size, wanted.branches) if wanted.branches else None
        self.compression = nn.ParameterDict(
            {name: nn.Parameter(weight) for name, weight in mean_weights(wanted.weights).items()}
        )
        self.out = nn.Linear(size.width, size.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        given = {one.name: self._vectors(one, x) for one in self.vectors}
        if self.gate is not None:
            given["gates"] = self.gate(x).sigmoid().unflatten(-1, self.heads).transpose(1, 2)
        given |= dict(self.compression.items())
        kind = given[self.vectors[0].name].dtype  # that of autocast, where weights keep their own
        mixed = self.attend(**{name: value.to(kind) for name, value in given.items()})
        mixed = mixed[0] if isinstance(mixed, tuple) else mixed  # further results are not trained
        return self.out(mixed.transpose(1, 2).flatten(-2))

    def _vectors(self, one: Vectors, x: Tensor) -> Tensor:
        heads = self.project[one.name](x).unflatten(-1, (one.heads, one.dim)).transpose(1, 2)
        return rotate(heads) if one.rotated else heads


def gate_layer(size: Size, branches: int) -> nn.Linear:
    """Logits of the gates, the same for all tokens at first: each gate is 1 / branches.

    So a new layer is the mean of its branches. Its output is of the size of any one of them, as with dense
    attention, and no branch has a head start. A zero weight has a gradient, so the gates do part.
    """
    layer = nn.Linear(size.width, size.query_heads * branches)
    nn.init.zeros_(layer.weight)
    share = min(1 / branches, 0.9)  # a single branch begins nearly open: the logit of 1 is infinite
    nn.init.constant_(layer.bias, math.log(share / (1 - share)))
    return layer


def mean_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights with which an entry is the mean of its tokens.

    For the two products around a gelu this is exact, as gelu(x) - gelu(-x) = x: half of the hidden units hold the mean,
    the other half its negative. So there are 2 dim hidden units; the module takes any number.
    """
    made = {}
    for name, shape in shapes.items():
        heads, *rest = shape
        match role(name):
            case "position":
                made[name] = torch.zeros(shape)
            case "weight":
                made[name] = torch.full(shape, 1 / shape[1])
            case "up":
                width, dim, _ = rest
                made[name] = (both_signs(dim).T / width).expand(heads, width, dim, 2 * dim).clone()
            case "down":
                _, dim = rest
                made[name] = both_signs(dim).expand(heads, 2 * dim, dim).clone()
    return made


def both_signs(dim: int) -> Tensor:
    """[2 dim, dim]: the identity over its negative."""
    one = torch.eye(dim)
    return torch.cat((one, -one))


def rotate(x: Tensor) -> Tensor:
    """Rotary positions 0, 1, ... on x [batch, heads, tokens, dim]; pairs are (i, i + dim / 2)."""
    cos, sin = turns(x.shape[-2], x.shape[-1], x.device)
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


@cache
def turns(tokens: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position x rate, the sine with the sign of its term: [tokens, dim] each."""
    half = torch.arange(dim // 2, device=device)
    angle = torch.arange(tokens, device=device)[:, None] * ROTARY_BASE ** (-2 * half / dim)
    return torch.cat((angle.cos(), angle.cos()), dim=-1), torch.cat((-angle.sin(), angle.sin()), dim=-1)
