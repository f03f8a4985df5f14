"""Units that no block of keys lies in, down to single tokens: lists of the caller, and chosen ones, in all phases."""

from __future__ import annotations

import pytest

from tests.numerics.cases import Shape
from tests.numerics.conftest import Engine
from tests.numerics.selected import by_rank, picked
from tests.numerics.test_selection import checked
from tests.numerics.test_selection_layouts import check_chunks, check_packed, check_padded

GIVEN = {
    "tokens": "causal t = given(most = 60) return attend(t)",
    "tokens of heads": "causal t = given(share = head) return attend(t)",
    "not causal": "t = given() return attend(t)",
    "and a window": "causal t = given() return attend(t | sliding(5))",
    "in a window": "causal t = given(unit = 3) return attend(t & sliding(30) | first(2))",
    "one list for all heads": "causal t = given(share = all) return attend(t | sliding(2))",
    "in a window, written long": "causal t = given() return attend(sliding(30) & (all - sliding(30) | t))",
    "units of 6": "causal t = given(unit = 6) return attend(t)",
    "units of 24 of heads": "causal t = given(unit = 24, share = head) return attend(t)",
    "units of 32": "causal t = given(unit = 32) return attend(t)",
    "units of 16 of heads": "causal t = given(unit = 16, share = head, most = 9) return attend(t)",
    "scores": (
        "causal t = given() slope = tensor(head) s = tensor(head) "
        "return attend(t | sliding(3), bias = slope[h] * (k - q), softcap = 2, sink_logit = s)"
    ),
    "a tensor": "causal t = given() doc = tensor(token, int) return attend(t & where(doc[k] == doc[q]))",
    "K as V": "causal kv = stream(value = key, v = 8) t = given() return attend(kv[t])",
    "two lists": "causal t = given() u = given(unit = 4, share = head) return gate(attend(t), attend(u | sliding(2)))",
}
CHOSEN = {
    "units of 8": picked("top_k(4, score = mass(coarse), unit = 8, force = first(1) | last(1))"),
    "units of 12": picked("top_k(3, score = mass(coarse), unit = 12)", "12, 4, by = mean"),
    "units of 4, united": by_rank(
        "top_k(5, score = rank, unit = max(4), share = max(group))", keys="chosen | sliding(3)"
    ),
    "units of 8 of heads": by_rank("top_k(3, score = rank, unit = max(8), share = head, force = last(1))"),
    "a threshold": by_rank("threshold(0.1, score = rank, unit = max(4), share = max(group), force = last(1))"),
    "tokens by an indexer": (
        "causal index = stream(value = none) i_query = query() "
        "chosen = top_k(7, score = dot(index, query = i_query), share = sum(group)) return attend(chosen)"
    ),
}


@pytest.mark.parametrize("name", GIVEN)
def test_given_lists(engine: Engine, name: str) -> None:
    body = GIVEN[name]
    checked(body, Shape(35, 35), engine(body))


@pytest.mark.parametrize("name", CHOSEN)
def test_chosen_lists(engine: Engine, name: str) -> None:
    body = CHOSEN[name]
    checked(body, Shape(35, 35), engine(body))


ALL = {**GIVEN, **CHOSEN}
ENDS = [0, 9, 9, 25, 47]


@pytest.mark.parametrize("name", ALL)
def test_packed_sequences(engine: Engine, name: str) -> None:
    if engine.name == "interpreted" and name not in ("tokens", "units of 8", "in a window"):
        pytest.skip("the same kernels in fewer patterns")
    check_packed(ALL[name], engine(ALL[name]), ENDS)


@pytest.mark.parametrize("name", ["tokens", "units of 6", "units of 8"])
def test_left_padding(engine: Engine, name: str) -> None:
    check_padded(ALL[name], engine(ALL[name]), [21, 0, 18])


@pytest.mark.parametrize("page", [None, 16, 32], ids=["contiguous", "16", "32"])
@pytest.mark.parametrize("name", [name for name in ALL if name != "not causal"])
def test_prefill_and_decode(engine: Engine, name: str, page: int | None) -> None:
    if engine.name == "interpreted" and (page == 32) == (list(ALL).index(name) % 2 == 0):
        pytest.skip("pairwise")
    chunks, decoded = ([17, 20], 2) if engine.name == "interpreted" else ([17, 1, 3], 20)
    check_chunks(ALL[name], engine(ALL[name]), page, chunks, decoded, 2)


@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (3, 1), (16, 1), (2, 2)])
@pytest.mark.parametrize("name", ["tokens", "tokens of heads", "units of 6", "units of 8"])
def test_groups_of_heads(engine: Engine, name: str, heads: int, kv_heads: int) -> None:
    if engine.name == "interpreted" and (heads == 4) == (name == "tokens"):
        pytest.skip("pairwise")
    checked(ALL[name], Shape(33, 40, heads=heads, kv_heads=kv_heads), engine(ALL[name]))


@pytest.mark.parametrize("unit", [1, 2, 3, 5, 7, 15, 17, 24, 31, 40])
def test_units_of_any_length(engine: Engine, unit: int) -> None:
    body = f"causal t = given(unit = {unit}) return attend(t)"
    checked(body, Shape(45, 45, batch=2), engine(body))
