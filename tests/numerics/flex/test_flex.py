"""Each published example of FlexAttention: the same output, log-sum-exp and gradients, in float64.

FlexAttention runs uncompiled. On the CPU it has no gradients of q, k and v, so these are compared with plain torch;
those of what a score function holds are its own.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

import spdsl
from tests.numerics.conftest import Engine
from tests.numerics.flex.examples import BATCH, EXAMPLES, HEADS, TOKENS, Example

PATTERNS = Path(__file__).parent / "patterns"
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
KV_HEADS, DIM = 2, 16


def module_of(name: str) -> ModuleType:
    return spdsl.load(PATTERNS / f"{name}.spat")


def vectors(example: Example) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(1)

    def normal(heads: int) -> Tensor:
        return torch.randn(example.batch, heads, TOKENS, DIM, generator=made, dtype=torch.float64)

    return normal(HEADS), normal(KV_HEADS), normal(KV_HEADS)


def of_flex(example: Example, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    mask = None
    if example.mask is not None:
        mask = create_block_mask(example.mask, example.batch, HEADS, TOKENS, TOKENS, device="cpu", BLOCK_SIZE=16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow uncompiled
        out, aux = flex_attention(
            q, k, v, example.score, block_mask=mask, enable_gqa=True, return_aux=AuxRequest(lse=True)
        )
    return out, aux.lse


def of_torch(example: Example, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition: every logit by the user's own functions."""
    b, h, i, j = torch.meshgrid(*(torch.arange(n) for n in (example.batch, HEADS, TOKENS, TOKENS)), indexing="ij")
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    logits = q @ k.mT / DIM**0.5
    if example.score is not None:
        logits = example.score(logits, b, h, i, j)
    if example.mask is not None:
        logits = logits.masked_fill(~example.mask(b, h, i, j), float("-inf"))
    return logits.softmax(-1) @ v


@pytest.mark.parametrize("name", EXAMPLES)
def test_outputs(engine: Engine, name: str) -> None:
    example = EXAMPLES[name]()
    q, k, v = vectors(example)
    out, lse = engine(module_of(name)).attention(q, k, v, **example.arguments, return_lse=True)
    torch.testing.assert_close((out, lse), of_flex(example, q, k, v), **CLOSE)


@pytest.mark.parametrize("name", EXAMPLES)
def test_gradients_of_vectors(engine: Engine, name: str) -> None:
    example = EXAMPLES[name]()
    leaves = [x.requires_grad_() for x in vectors(example)]
    grad = torch.randn(example.batch, HEADS, TOKENS, DIM, generator=torch.Generator().manual_seed(2)).double()
    found = torch.autograd.grad(engine(module_of(name)).attention(*leaves, **example.arguments), leaves, grad)
    torch.testing.assert_close(found, torch.autograd.grad(of_torch(example, *leaves), leaves, grad), **CLOSE)


@pytest.mark.parametrize("name", [name for name, example in EXAMPLES.items() if example().learned])
def test_gradients_of_a_bias(engine: Engine, name: str) -> None:
    example = EXAMPLES[name]()
    q, k, v = vectors(example)
    learned = example.arguments[example.learned].requires_grad_()
    grad = torch.randn(example.batch, HEADS, TOKENS, DIM, generator=torch.Generator().manual_seed(2)).double()
    out = engine(module_of(name)).attention(q, k, v, **example.arguments)
    found = torch.autograd.grad(out, learned, grad)
    torch.testing.assert_close(found, torch.autograd.grad(of_flex(example, q, k, v)[0], learned, grad), **CLOSE)


def test_every_example_is_compared() -> None:
    assert set(EXAMPLES) == {path.stem for path in PATTERNS.glob("*.spat")}
    assert BATCH > 1  # numbers by batch row count
