"""What happens to a cache, by its arguments: refused by name, nothing changed; and what the host knows of lengths."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

import spdsl

X = torch.zeros(3, 2, 5, 16)
V = torch.zeros(3, 2, 5, 24)


@pytest.fixture(scope="module")
def module() -> ModuleType:
    return spdsl.load("pattern events { causal return attend(sliding(8)) }")


def cache_of(module: ModuleType, page: int | None = 16, **how: Any) -> Any:
    return module.Cache(3, 40, kv_heads=2, qk_dim=16, v_dim=24, page=page, **how)


WRONG: dict[str, list[tuple[str, Any]]] = {
    "truncate": [
        ("lengths", x)
        for x in (
            -1, 1.5, True, None, "3", [1, 2], [1, 2, 3.0], [1, 2, -3], torch.tensor(3), torch.tensor([1, 2]),
            torch.tensor([1.0, 2, 3]), torch.tensor([True, False, True]), torch.tensor([1, 2, 3]).to_sparse(),
        )
    ],
    "select": [
        ("rows", x)
        for x in ([3], [-1], [1.0], [True], "0", None, torch.tensor([3]), torch.tensor([0.0]), torch.tensor([[0]]))
    ],
}  # fmt: skip


@pytest.mark.parametrize("page", [16, None])
@pytest.mark.parametrize("name", WRONG)
def test_refused(module: ModuleType, name: str, page: int | None) -> None:
    cache = cache_of(module, page)
    cache.append(X, V)
    for argument, wrong in WRONG[name]:
        with pytest.raises((TypeError, ValueError), match=f"^{argument}: expected"):
            getattr(cache, name)(wrong)
        assert (cache.lengths.tolist(), cache.batch) == ([5, 5, 5], 3)


ROWS = [[0, 0], [3], [-1], [0.0], torch.tensor([0, 0]), torch.tensor([[0]]), torch.tensor([True])]


@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_rows_of_a_call_are_refused(module: ModuleType, rows: Any) -> None:
    cache, number = cache_of(module), len(rows)
    with pytest.raises((TypeError, ValueError), match=r"^rows: expected"):
        cache.append(X[:number], V[:number], rows=rows)
    with pytest.raises((TypeError, ValueError), match=r"^rows: expected"):
        module.decode(X[:number, :, :1], X[:number, :, :1], V[:number, :, :1], cache, rows=rows)
    assert cache.lengths.tolist() == [0, 0, 0]


def test_which_tokens_are_refused(module: ModuleType) -> None:
    cache = cache_of(module)
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("k", {"rows": [0, 1]}),
        ("lengths", {"lengths": torch.tensor([1, 2])}),
        ("lengths", {"lengths": torch.tensor([1, 2, 6])}),
        ("lengths", {"lengths": torch.tensor([1, 2, -1])}),
        ("q", {"cu_seqlens": torch.tensor([0, 1, 2, 3])}),
        ("max_seqlen", {"max_seqlen": 5}),
        ("cu_seqlens, lengths", {"lengths": torch.tensor([1, 2, 3]), "cu_seqlens": torch.tensor([0, 1, 2, 3])}),
    ]
    for name, where in wrong:
        with pytest.raises((TypeError, ValueError), match=f"^{name}"):
            cache.append(X, V, **where)
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected 4 numbers, got 3"):
        cache.append(X[:1], V[:1], cu_seqlens=torch.tensor([0, 1, 5]))
    with pytest.raises(TypeError, match="length"):
        cache.append(X, V, length=3)
    for name, k, v in (("k", X[0], V), ("v", X, V[:, :, :4]), ("v", X, V[:2]), ("k", X.double(), V), ("v", X, None)):
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
            cache.append(k, v)
    assert cache.lengths.tolist() == [0, 0, 0]


def test_states_are_refused(module: ModuleType) -> None:
    cache = cache_of(module)
    cache.append(X, V)
    states = cache_of(module, None).export_states()
    for changed in (
        None, {}, {**states, "k.other": X}, {**states, "lengths": states["lengths"].long()},
        {**states, "k.kv": states["k.kv"][:, :, :39]}, {**states, "v.kv": states["v.kv"].double()},
        {**states, "k.kv": None},
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=r"^(states|lengths|k\.kv|v\.kv): expected"):
            cache.import_states(changed)
        assert cache.lengths.tolist() == [5, 5, 5]


def test_states_have_names_shapes_and_bytes() -> None:
    module = spdsl.load(
        "pattern s { causal doc = tensor(token, int) near = attend(where(doc[k] == doc[q])) entries = compress(8, 4) "
        "return gate(near, attend(entries)) }"
    )
    cache = module.Cache(2, 40, kv_heads=2, qk_dim=16, v_dim=24, page=16)
    named = {state.name: (state.grid, state.update) for state in cache.states}
    assert named == {
        "k.kv": ("token", "append"), "v.kv": ("token", "append"), "tokens.doc": ("row", "append"),
        "k.entries": ("entries", "close"), "v.entries": ("entries", "close"),
    }  # fmt: skip
    kept = cache.kept()
    assert kept["k.kv"] == ((7, 2, 16, 16), 7 * 2 * 16 * 16 * 4)
    assert kept["tokens.doc"] == ((2, 41), 2 * 41 * 8)
    assert kept["page_table"] == ((2, 3), 2 * 3 * 4)
    shapes = {name: list(x.shape) for name, x in cache.export_states().items()}
    assert shapes == {
        "lengths": [2], "dropped": [2], "k.kv": [2, 2, 40, 16], "v.kv": [2, 2, 40, 24], "tokens.doc": [2, 40],
        "k.entries": [2, 2, 9, 16], "v.entries": [2, 2, 9, 24],
    }  # fmt: skip


@pytest.mark.parametrize("inference", [False, True])
def test_lengths_that_others_write_are_seen(module: ModuleType, inference: bool) -> None:
    """Until the host knows better, no call is certain to overflow."""
    with torch.inference_mode(inference):
        cache = cache_of(module)
        for _ in range(8):
            cache.append(X, V)
        with pytest.raises(ValueError, match="at most 0 more tokens"):
            cache.append(X, V)
        cache.truncate(20)
        cache.append(X, V)
        assert cache.lengths.tolist() == [25, 25, 25]
        cache.truncate(40)
        for _ in range(3):
            cache.append(X, V)
        cache.lengths.sub_(35)
        cache.append(X, V)
        cache.lengths = torch.tensor([3, 2, 40])
        out, lse = module.prefill(X, X, V, cache, return_lse=True)
        assert cache.lengths.tolist() == [8, 7, 40]
        assert cache.dropped.tolist() == [0, 0, 5]
        assert (out[2] == 0).all()
        assert (lse[2] == -torch.inf).all()
        assert lse[:2].isfinite().all()
