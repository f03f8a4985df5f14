"""Compression and selection: results and all gradients in fp64 against the oracle, the chosen units as sets."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest

from tests.numerics.cases import Found, Shape, assert_same, generated, guarded, inputs_of, meant
from tests.numerics.conftest import Engine
from tests.numerics.patterns import pattern_of
from tests.numerics.selected import PUBLISHED, SELECTED, expect_lists, nsa, recorded
from tests.quick import quick


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
    """Some bodies say how many heads there are."""
    return Shape(rows, rows, **{**more, **({"heads": 4, "kv_heads": 2} if "heads query" in body else {})})


@pytest.mark.parametrize("name", quick(SELECTED, PUBLISHED))
def test_every_pattern(engine: Engine, name: str) -> None:
    body = SELECTED[name]
    rows = 21 if engine.name == "interpreted" else 83
    checked(body, replace(shape_of(body, rows), keys=75 if engine.name == "interpreted" else 83), engine(body))


# Below the first entry, around a unit, a prime.
@pytest.mark.parametrize("rows", [1, 7, 8, 15, 16, 17, 31])
@pytest.mark.parametrize("name", ["nsa", "moba", "chosen and near"])
def test_sizes(engine: Engine, name: str, rows: int) -> None:
    if engine.name == "interpreted" and (name != "nsa") == (rows in (1, 8, 15, 17)):
        pytest.skip("pairwise")
    checked(SELECTED[name], Shape(rows, rows, batch=2 if rows < 9 else 1), engine(SELECTED[name]))


@pytest.mark.parametrize("rows, keys", [(5, 40), (1, 37), (40, 17)])
@pytest.mark.parametrize("name", ["nsa", "heads apart"])
def test_other_numbers_of_rows_and_keys(engine: Engine, name: str, rows: int, keys: int) -> None:
    if engine.name == "interpreted" and (name == "nsa") == (rows == 1):
        pytest.skip("pairwise")
    checked(SELECTED[name], Shape(rows, keys), engine(SELECTED[name]))


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 2), (3, 1), (10, 2), (16, 1)])
@pytest.mark.parametrize("name", ["nsa", "heads apart", "threshold", "threshold of a logit"])
def test_groups_of_heads(engine: Engine, name: str, heads: int, kv_heads: int) -> None:
    if engine.name == "interpreted" and name != ("heads apart" if heads == 4 else "threshold of a logit"):
        pytest.skip("pairwise")
    rows = 18 if engine.name == "interpreted" else 35
    checked(SELECTED[name], Shape(rows, 35, heads=heads, kv_heads=kv_heads), engine(SELECTED[name]))


@pytest.mark.parametrize(
    "name, qk, v",
    [
        ("weighted", 24, 24), ("weighted", 80, 16), ("weighted", 96, 96), ("weighted", 192, 128), ("weighted", 3, 1),
        ("heads apart", 80, 96), ("heads apart", 24, 40),
    ],
)  # fmt: skip
def test_head_dims(engine: Engine, name: str, qk: int, v: int) -> None:
    checked(SELECTED[name], Shape(34, 34, qk=qk, v=v), engine(SELECTED[name]))


@pytest.mark.parametrize("size", [97, 160, 301])
@pytest.mark.parametrize("name", ["nsa", "infllm_v2", "units of four cells", "units of 48"])
def test_many_units(cpu: Engine, name: str, size: int) -> None:
    checked(SELECTED[name], Shape(size, size, batch=2, heads=6, kv_heads=2, qk=24, v=40), cpu(SELECTED[name]))


@pytest.mark.full
@pytest.mark.parametrize("heads, kv_heads, qk, v", [(2, 2, 16, 16), (6, 2, 24, 40), (5, 1, 80, 16), (16, 1, 16, 24)])
@pytest.mark.parametrize("rows", [1, 7, 15, 16, 17, 33, 37, 70])
@pytest.mark.parametrize("name", SELECTED)
def test_everything(engine: Engine, name: str, rows: int, heads: int, kv_heads: int, qk: int, v: int) -> None:
    body = SELECTED[name]
    checked(body, shape_of(body, rows, batch=2, heads=heads, kv_heads=kv_heads, qk=qk, v=v), engine(body))


@pytest.mark.full
@pytest.mark.parametrize("by", ["mean", "max", "weighted", "mlp"])
@pytest.mark.parametrize("count", [3, 4])
@pytest.mark.parametrize("width, stride, block", [(8, 4, 16), (16, 16, 16), (32, 16, 64), (16, 4, 32), (24, 8, 48)])
def test_every_grid(engine: Engine, width: int, stride: int, block: int, count: int, by: str) -> None:
    body = nsa(width, stride, block, count, by=by)
    checked(body, Shape(97, 97, heads=4, kv_heads=2), engine(body))
