"""The full product: every pattern, size and head layout, on both engines."""

from __future__ import annotations

import pytest

from tests.numerics.cases import Shape, checked
from tests.numerics.conftest import Engine
from tests.numerics.patterns import NAMES

SIZES = [(1, 1), (15, 15), (16, 16), (17, 17), (33, 33), (37, 37), (70, 70), (17, 40), (40, 17), (1, 33)]
HEADS = [(2, 2, 16, 16), (6, 2, 24, 40), (5, 1, 80, 16)]


@pytest.mark.full
@pytest.mark.parametrize("heads, kv_heads, qk, v", HEADS)
@pytest.mark.parametrize("rows, keys", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_everything(
    engine: Engine, name: str, rows: int, keys: int, heads: int, kv_heads: int, qk: int, v: int
) -> None:
    checked(name, Shape(rows, keys, 2, heads, kv_heads, qk, v), module=engine(name))
