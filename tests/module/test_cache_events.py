"""What happens to a cache, by its arguments: refused by name, nothing changed; and what the host knows of lengths."""

from __future__ import annotations

import copy
import inspect
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


@pytest.mark.parametrize("inference", [False, True])
def test_a_copy_knows_its_lengths(module: ModuleType, inference: bool) -> None:
    with torch.inference_mode(inference):
        cache = cache_of(module)
        for _ in range(7):
            cache.append(X, V)
        other = copy.deepcopy(cache)
        other.append(X, V)
        with pytest.raises(ValueError, match="at most 0 more tokens"):
            other.append(X, V)
        other.lengths.sub_(9)
        again = copy.deepcopy(other)
        for x in (other, again, cache):
            x.append(X, V)
        assert [x.lengths.tolist() for x in (other, again, cache)] == [[36] * 3, [36] * 3, [40] * 3]


def table_of(axes: str, read: str) -> ModuleType:
    return spdsl.load(f"pattern t {{ causal m = tensor({axes}) return attend(all, bias = {read}) }}")


def test_states_of_tensors_over_tokens_have_all_axes() -> None:
    """The heads of the query are said by the caller, the pattern or the first call; until then there is no buffer."""
    module = table_of("token, head, 5", "m[k][h][2]")
    sizes = {"kv_heads": 2, "qk_dim": 16, "v_dim": 24}
    for cache in (module.Cache(3, 40, **sizes, query_heads=4), module.Cache(3, 40, **sizes)):
        known = cache.states[2].sizes is not None
        assert ("tokens.m" in cache.kept()) == known
        moved = module.Cache(3, 40, **sizes)
        moved.import_states(cache.export_states())
        cache.append(X, V, torch.ones(3, 5, 4, 5))
        assert cache.states[2].axes == (("head", 4), ("5", 5))
        assert cache.kept()["tokens.m"] == ((3, 41, 4, 5), 3 * 41 * 4 * 5 * 4)
        states = cache.export_states()
        assert states["tokens.m"].shape == (3, 40, 4, 5)
        assert states["tokens.m"].sum() == 3 * 5 * 4 * 5
        moved.import_states(states)
        moved.select([0, 2])
        moved.truncate(3)
        assert moved.kept()["tokens.m"].shape == (2, 41, 4, 5)
        assert moved.export_states()["tokens.m"].sum() == 2 * 3 * 4 * 5
        with pytest.raises(ValueError, match=r"^tokens\.m: expected \[3, 40, 4, 5\] of torch.float32, got"):
            cache.import_states({**states, "tokens.m": states["tokens.m"][:, :, :3]})
    declared = spdsl.load(
        "pattern t {\n heads query = 6, kv = 2\n causal m = tensor(token, head) return attend(all, bias = m[k][h]) }"
    )
    assert declared.Cache(3, 40, qk_dim=16, v_dim=24).kept()["tokens.m"].shape == (3, 41, 6)
    with pytest.raises(TypeError, match=r"^query_heads: expected a number >= 1, got float"):
        module.Cache(3, 40, **sizes, query_heads=4.0)


def test_tensors_over_tokens_are_refused_before_anything_is_stored() -> None:
    module = table_of("token, head", "m[k][h]")
    cache = cache_of(module)
    q, m = torch.zeros(3, 4, 5, 16), torch.zeros(3, 5, 4)
    cache.append(X, V, m)
    wrong = [m[0], m[:, :4], m[:2], m[:, :, :2], m.mT, m.long(), m[..., None], None]
    for x in wrong:
        with pytest.raises((TypeError, ValueError), match=r"^m: expected"):
            module.prefill(q, X, V, x, cache)
        with pytest.raises((TypeError, ValueError), match=r"^m: expected"):
            cache.append(X, V, x)
    with pytest.raises(ValueError, match=r"^m: expected \[4\] beside tokens, like the cache, got \[2\]"):
        module.prefill(q[:, :2], X, V, m[:, :, :2], cache)
    assert cache.lengths.tolist() == [5, 5, 5]


def test_tensors_over_pairs_of_tokens_are_refused() -> None:
    """A cache would have to keep a number for each pair: new tokens do not bring those of old ones."""
    module = table_of("token, token", "m[q][k]")
    cache, m = cache_of(module), torch.zeros(3, 5, 5)
    for call in (lambda: module.prefill(X, X, V, m, cache), lambda: cache.append(X, V, m)):
        with pytest.raises(
            ValueError, match=r"^m: expected one token axis where a cache keeps a tensor, got token, token"
        ):
            call()
    assert module.attention(X, X, V, m).shape == V.shape
    assert cache.lengths.tolist() == [0, 0, 0]


@pytest.mark.parametrize("axes, read, shape", [("token, 16", "m[k][2]", (5, 16)), ("token, token", "m[q][k]", (5, 5))])
def test_what_no_step_reads_may_be_passed_and_left_out(axes: str, read: str, shape: tuple[int, ...]) -> None:
    module = spdsl.load(
        f"pattern t {{ causal m = tensor({axes}) return attend(all, bias = {read}) if train return attend(all) }}"
    )
    m = torch.zeros(3, *shape)
    cache = cache_of(module)
    assert "tokens.m" not in cache.kept()
    found = [module.prefill(X, X, V, cache_of(module), **given) for given in ({}, {"m": m})]
    assert torch.equal(*found)
    with pytest.raises(ValueError, match=r"^m: expected"):
        module.prefill(X, X, V, cache, m=m[:, :3])


@pytest.mark.parametrize("pattern", ["nsa", "streaming_llm"])
def test_signatures_spell_out_which_tokens_a_call_brings(pattern: str) -> None:
    """What completion and `help` show."""
    module = spdsl.load(f"patterns/{pattern}.spat")
    wanted = {
        "lengths": "Tensor | None", "cu_seqlens": "Tensor | None", "max_seqlen": "int | None",
        "rows": "Sequence[int] | Tensor | None",
    }  # fmt: skip
    for function in (module.prefill, module.decode, module.Cache.append):
        found = inspect.signature(function).parameters
        assert {name: found[name].annotation for name in wanted} == wanted
        assert all(found[name].kind is inspect.Parameter.KEYWORD_ONLY for name in wanted)
        assert function is module.Cache.append or inspect.Parameter.VAR_KEYWORD not in {x.kind for x in found.values()}
    found = inspect.signature(module.attend_paged).parameters
    assert found["max_seqlen_q"].annotation == "int | None"
    assert "lengths, cu_seqlens" in module.prefill.__doc__
    assert "rows" in module.decode.__doc__


def test_a_mistyped_keyword_is_named(module: ModuleType) -> None:
    cache, x = cache_of(module), X[:, :, :1]
    for name, call in (
        ("prefill", lambda: module.prefill(x, x, V[:, :, :1], cache, lenghts=torch.tensor([1, 1, 1]))),
        ("decode", lambda: module.decode(x, x, V[:, :, :1], cache, lenghts=torch.tensor([1, 1, 1]))),
        ("append", lambda: cache.append(x, V[:, :, :1], lenghts=torch.tensor([1, 1, 1]))),
        ("attend_paged", lambda: module.attend_paged(x, x, x, x, x, x, lenghts=1)),
    ):
        with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected keyword argument 'lenghts'"):
            call()
    with pytest.raises(TypeError, match=r"^append\(\) got multiple values for argument 'k'"):
        cache.append(x, V[:, :, :1], k=x)
    with pytest.raises(TypeError, match=r"^append\(\) missing required arguments: v"):
        cache.append(x)
    assert cache.lengths.tolist() == [0, 0, 0]


def test_a_ring_keeps_no_tensors_over_tokens() -> None:
    """What grows with the tokens would not be bounded."""
    module = spdsl.load("pattern t { causal w = tensor(token) return attend(sliding(8), bias = w[k]) }")
    with pytest.raises(TypeError, match="unexpected keyword argument 'ring'"):
        cache_of(module, ring=4)
    assert "No ring: w is kept of every token." in module.Cache.__doc__


def test_buffers_have_the_shapes_that_are_documented(module: ModuleType) -> None:
    """One page, or one token of each sequence, more than there is room for."""
    pages, whole, ring = cache_of(module), cache_of(module, None), cache_of(module, ring=4)
    assert pages.k["kv"].shape == (pages.page_table.numel() + 1, 2, 16, 16)
    assert whole.v["kv"].shape == (3, 2, 40 + 1, 24)
    assert ring.k["kv"].shape == (3 * ring.ring.pages + 1, 2, 16, 16)
    table = torch.tensor([[7, -1, 2], [0, 1, 30], [3, 4, 5]], dtype=torch.int32)
    assert cache_of(module, page_table=table).k["kv"].shape == (30 + 1 + 1, 2, 16, 16)
    assert "[pages + 1, heads, page, qk]" in inspect.getdoc(module.Cache.__mro__[1])
