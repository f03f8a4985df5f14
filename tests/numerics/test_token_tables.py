"""Tensors over tokens with further axes: what tests and biases read, and the tiles that lists leave out."""

from __future__ import annotations

import pytest
import torch

from tests.numerics.cases import Shape, checked
from tests.numerics.conftest import Engine

BODIES = {
    "token, head": "causal m = tensor(token, head, int) return attend(sliding(3) | where(m[k][h] == m[q][h]))",
    "head, token": "causal m = tensor(head, token, int) return attend(sliding(3) | where(m[h][k] == m[h][q]))",
    "kv_head, token": "causal m = tensor(kv_head, token, int) return attend(sliding(3) | where(m[h][k] == m[h][q]))",
    "token, kv_head": "m = tensor(token, kv_head, int) return attend(sliding(3) | where(m[k][h] <= m[q][h]))",
    "number, token, head": "causal m = tensor(2, token, head, bool) return attend(sliding(3) | where(m[1][k][h]))",
    "token, number": "causal m = tensor(token, 16, bool) return attend(sliding(3) | where(m[k][q % 16]))",
    "token, head, bias": "causal m = tensor(token, head) return attend(sliding(20), bias = m[k][h])",
}


@pytest.mark.parametrize("tokens", [50, 20])
@pytest.mark.parametrize("name", BODIES)
def test_attention(engine: Engine, name: str, tokens: int) -> None:
    checked(BODIES[name], Shape(tokens, tokens, batch=2, heads=4, kv_heads=2), module=engine(BODIES[name]))


def test_two_numbers_of_a_token(engine: Engine) -> None:
    """Each has bounds of its own: here every token has 1 and 2."""
    module = engine("a = tensor(2, token, int) return attend(where(a[0][k] == 1 & a[1][k] == 2))")
    q, k, v = (torch.randn(1, 1, 20, 16, dtype=torch.float64) for _ in "qkv")
    found = module.attention(q, k, v, torch.tensor([1, 2])[None, :, None].expand(1, 2, 20))
    torch.testing.assert_close(found, torch.softmax(q @ k.mT / 4, -1) @ v, rtol=1e-10, atol=1e-10)


def test_pairs_of_tokens_in_packed_sequences(engine: Engine) -> None:
    """Both axes begin at the first token of each."""
    module = engine("near = tensor(token, token, int) return attend(where(near[q][k] > 1) | sliding(1))")
    q, k, v = (torch.randn(1, 2, 37, 16, dtype=torch.float64) for _ in "qkv")
    near = torch.randint(0, 3, (1, 37, 37))
    seen = (near[0] > 1) | torch.eye(37, dtype=torch.bool)
    seen[:19, 19:] = seen[19:, :19] = False
    found = module.attention(q, k, v, near, cu_seqlens=torch.tensor([0, 19, 37]))
    wanted = torch.softmax((q @ k.mT / 4).masked_fill(~seen, -torch.inf), -1) @ v
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("at", ["k", "k - 9", "min(q - k, 2)", "q % 7"])
def test_outside_of_a_size_it_is_0(engine: Engine, at: str) -> None:
    """What lies behind it in memory is not read."""
    module = engine(f"causal a = tensor(3) return attend(all, bias = a[{at}])")
    q, k, v = (torch.randn(1, 1, 20, 16, dtype=torch.float64) for _ in "qkv")
    a = torch.full((40,), torch.nan, dtype=torch.float64)[16:19].copy_(torch.tensor([1.0, -2.0, 3.0]))
    i, j = torch.arange(20)[:, None], torch.arange(20)
    index = {"k": j, "k - 9": j - 9, "min(q - k, 2)": (i - j).clamp(max=2), "q % 7": i % 7}[at].expand(20, 20)
    bias = torch.where((index >= 0) & (index < 3), a[index.clamp(0, 2)], 0.0)
    wanted = torch.softmax((q @ k.mT / 4 + bias).masked_fill(j > i, -torch.inf), -1) @ v
    torch.testing.assert_close(module.attention(q, k, v, a), wanted, rtol=1e-10, atol=1e-10)
