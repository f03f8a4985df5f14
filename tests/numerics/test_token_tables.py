"""Tensors over tokens with further axes: what tests and biases read, and the tiles that lists leave out."""

from __future__ import annotations

import pytest

from tests.numerics.cases import Shape, checked
from tests.numerics.conftest import Engine

BODIES = {
    "token, head": "causal m = tensor(token, head, int) return attend(sliding(3) | where(m[k][h] == m[q][h]))",
    "head, token": "causal m = tensor(head, token, int) return attend(sliding(3) | where(m[h][k] == m[h][q]))",
    "kv_head, token": "causal m = tensor(kv_head, token, int) return attend(sliding(3) | where(m[h][k] == m[h][q]))",
    "token, kv_head": "m = tensor(token, kv_head, int) return attend(sliding(3) | where(m[k][h] <= m[q][h]))",
    "number, token, head": "causal m = tensor(2, token, head, bool) return attend(sliding(3) | where(m[1][k][h]))",
    "token, number": "causal m = tensor(token, 16, bool) return attend(sliding(3) | where(m[k][q % 16]))",
    "two of a token": "causal m = tensor(2, token, bool) return attend(sliding(3) | where(m[0][k] != m[1][k] & m[1][k]))",
    "token, head, bias": "causal m = tensor(token, head) return attend(sliding(20), bias = m[k][h])",
}


@pytest.mark.parametrize("tokens", [50, 20])
@pytest.mark.parametrize("name", BODIES)
def test_attention(engine: Engine, name: str, tokens: int) -> None:
    checked(BODIES[name], Shape(tokens, tokens, batch=2, heads=4, kv_heads=2), module=engine(BODIES[name]))
