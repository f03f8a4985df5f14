"""Compression and selection: results and all gradients in fp64 against the oracle, the chosen units as sets."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.numerics.cases import Found, Shape, assert_same, generated, guarded, inputs_of, meant
from tests.numerics.conftest import Engine
from tests.numerics.patterns import pattern_of
from tests.numerics.selected import SELECTED, expect_lists, nsa, recorded


def checked(body: str, shape: Shape, module: ModuleType, **how: bool) -> Found:
    """A module against the oracle, its inputs amid NaN, its choices its own."""
    pattern = pattern_of(body)
    inputs = {key: guarded(x) for key, x in inputs_of(pattern, shape).items()}
    with recorded(module, pattern) as lists:
        found = generated(module, pattern, inputs, **how)
    assert_same(found, meant(pattern, inputs, **how))
    if lists:
        expect_lists(lists, pattern, inputs)
    return found


def shape_of(body: str, rows: int, **more: int) -> Shape:
    return Shape(rows, rows, **{"heads": 4, "kv_heads": 2, **more} if "heads query" in body else more)


@pytest.mark.parametrize("name", SELECTED)
def test_every_pattern(engine: Engine, name: str) -> None:
    body = SELECTED[name]
    checked(body, shape_of(body, 37 if engine.name == "interpreted" else 83), engine(body))
