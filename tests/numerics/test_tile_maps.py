"""Choices for tiles of queries: maps that stand in any set, in one softmax with others, forward and backward."""

from __future__ import annotations

import random
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import spdsl
from spdsl.oracle import dense
from spdsl.runtime.cpu import cpu as cpu_path
from spdsl.runtime.cpu.cpu_tiles import TileData
from tests.library import broken
from tests.numerics.cases import Shape, cut, inputs_of
from tests.numerics.conftest import Engine
from tests.numerics.patterns import pattern_of, text_of
from tests.numerics.selected import expect_lists, recorded
from tests.numerics.test_attend_paged import check, filled, with_states
from tests.numerics.test_selection import checked
from tests.numerics.test_selection_layouts import check_packed, check_padded

TILES = (
    "style = tensor(head, int) column = tensor(head, token, bool) slash = tensor(head, token, bool) p = tensor(head) "
    "table = given(rows = 8, unit = 4, share = head) "
    "cells = compress(8) rank = dot(cells) share_of = softmax(rank) "
    "best = top_k(2, score = rank, rows = max(16), unit = max(16), share = head, force = last(1)) "
    "mass = top_p(p[h], score = share_of, rows = sum(32), share = head, force = first(1)) "
    "under = top_p(0.6, score = share_of, rows = mean(16), unit = sum(24), share = sum(group), side = below, "
    "least = 1, within = ~first(1)) "
    "strong = threshold(0.1, score = share_of, rows = max(48), unit = max(16), share = max(group), least = 1, "
    "most = 3) "
)
NAMES = ("best", "mass", "under", "strong")
MIXTURE = (
    "best & where(style[h] % 4 == 0) | (where(column[h][k]) | where(slash[h][q - k])) & where(style[h] % 4 == 1) "
    "| (sliding(9) | sink(3)) & where(style[h] % 4 == 2) | (mass - sliding(5)) & where(style[h] % 4 == 3)"
)
SETS = {
    "a complement": "~best",
    "two of them": "best | mass",
    "a difference of two": "mass - best",
    "all four, and more": "(best & mass | under) - strong | sliding(3, ahead = 2)",
    "beside tiles of the caller": "best & table | ~under & sliding(20, ahead = 9)",
    "a mixture of heads": MIXTURE,
}


NESTED = (
    "wide = top_k(1, score = rank, rows = max(32), unit = max(16), share = head) "
    "owned = given(rows = 48, unit = 4, share = head) "
)
WITHIN = {
    "a choice": "top_k(2, score = share_of, rows = sum(16), unit = sum(8), share = head, within = wide)",
    "a complement": "top_p(0.7, score = share_of, rows = mean(32), share = head, "
    "within = ~wide, side = below, least = 1)",
    "tokens": "threshold(0.3, score = share_of, rows = sum(16), share = sum(group), least = 1, most = 2, "
    "within = where(column[h][k] & k < 30) | last(2), force = where(slash[h][k] & style[h] % 2 == 0))",
    "a set of the caller": "top_k(1, score = rank, rows = max(16), unit = max(24), share = max(group), "
    "within = owned - wide | where(2 * k > length), force = where(k % 25 == 22))",
    "tokens that only long sequences have": "top_k(1, score = rank, rows = max(16), unit = max(24), "
    "share = max(group), within = where(k % 25 == 22))",
}


def body(text: str, order: str = "") -> str:
    answer = f"return attend({text}) if prefill return attend(all)" if order else f"return attend({text})"
    return f"{order} {TILES} {answer}"


def drawn(seed: int) -> str:
    """A set of two to four parts, with a choice of tiles among them."""
    rng = random.Random(seed)
    others = ("table", "sliding(7, ahead = 3)", "sink(5)", "where(column[h][k])", "where(style[h] % 2 == 0)")
    parts = [rng.choice(NAMES), *(rng.choice((*NAMES, *others)) for _ in range(rng.randint(1, 3)))]
    text = parts[0]
    for part in parts[1:]:
        sign, no = rng.choice("||&-"), rng.choice(("", "", "~"))
        text = rng.choice((f"({text} {sign} {no}{part})", f"({no}{part} {sign} {text})"))
    return f"{text} | sliding(2)"


@pytest.mark.parametrize("name", SETS)
def test_sets_of_tiles(engine: Engine, name: str) -> None:
    if engine.name == "interpreted" and name not in ("all four, and more", "a mixture of heads"):
        pytest.skip("the same kernels in fewer patterns")
    shape = Shape(21, 57, 1, 4, 2) if engine.name == "interpreted" else Shape(61, 90, 2, 4, 2)
    checked(body(SETS[name]), shape, engine(body(SETS[name])))


def nested(name: str, order: str = "") -> str:
    answer = "return attend(inner | sliding(3))"
    last = f"{answer} if prefill return attend(all)" if order else answer
    return f"{order} {TILES} {NESTED} inner = {WITHIN[name]} {last}"


@pytest.mark.parametrize("name", WITHIN)
def test_units_that_other_sets_allow_or_force(engine: Engine, name: str) -> None:
    if engine.name == "interpreted" and name not in ("a complement", "tokens"):
        pytest.skip("the same kernels in fewer patterns")
    own = nested(name)
    checked(own, Shape(21, 57, 1, 4, 2) if engine.name == "interpreted" else Shape(61, 90, 2, 4, 2), engine(own))


def test_other_sets_in_packed_and_padded_sequences(engine: Engine) -> None:
    for name in ("tokens", "a complement"):
        check_packed(nested(name), engine(nested(name)), [0, 21, 38])
    check_padded(nested("a complement"), engine(nested("a complement")), [21, 0, 18])


@pytest.mark.parametrize("name", ["tokens", "a choice"])
def test_other_sets_in_chunks(engine: Engine, name: str) -> None:
    own = nested(name, "causal")
    in_chunks(own, engine(own), (19, 16, 1, 10))


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.full) for seed in range(3, 60))])
def test_random_sets_of_tiles(cpu: Engine, seed: int) -> None:
    rng = random.Random(seed)
    keys = rng.randint(1, 90)
    checked(body(drawn(seed)), Shape(rng.choice([keys, rng.randint(1, keys)]), keys, 2, 4, 2), cpu(body(drawn(seed))))


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=pytest.mark.full) for seed in range(100, 112)])
def test_random_sets_of_tiles_by_kernels(kernels: Engine, seed: int) -> None:
    checked(body(drawn(seed)), Shape(23, 23 + seed % 30, 1, 4, 2), kernels(body(drawn(seed))))


def test_packed_and_padded(engine: Engine) -> None:
    """Tiles count from the first token of each sequence."""
    own = body(SETS["all four, and more"])
    check_packed(own, engine(own), [0, 21, 38])
    check_padded(own, engine(own), [21, 0, 18])


def in_chunks(own: str, module: ModuleType, chunks: tuple[int, ...], page: int | None = 16) -> None:
    """A prefill in chunks: the queries that a call has of a tile choose together."""
    pattern, tokens = pattern_of(own), sum(chunks)
    inputs = inputs_of(pattern, Shape(tokens, tokens, 2, 4, 2))
    cache = module.Cache(2, tokens + 9, kv_heads=2, qk_dim=16, v_dim=16, page=page, dtype=torch.float64)
    first = 0
    for rows in chunks:
        end = first + rows
        new = tiles_cut(own, inputs, first, end)
        found = module.prefill(**new, cache=cache, return_lse=True)
        seen = {**tiles_cut(own, inputs, 0, end), "q": new["q"], "table": new["table"]}
        ((out, lse),) = dense.results(pattern, seen, "prefill")
        torch.testing.assert_close(found[0], out, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found[1], lse, rtol=1e-10, atol=1e-10)
        first = end


def tiles_cut(own: str, inputs: dict[str, Tensor], first: int, end: int) -> dict[str, Tensor]:
    """The inputs of the tokens first..end - 1, and the tiles of the caller that hold them."""
    found = cut(pattern_of(own), inputs, first, end)
    return found | {"table": inputs["table"][:, :, first // 8 : (end - 1) // 8 + 1]}


@pytest.mark.parametrize("name, page", [("two of them", None), ("a mixture of heads", 16)])
def test_chunks_that_begin_within_a_tile(engine: Engine, name: str, page: int | None) -> None:
    own = body(SETS[name], "causal")
    in_chunks(own, engine(own), (19, 16, 1, 10) if engine.name == "interpreted" else (19, 16, 1, 34), page)


@pytest.mark.parametrize("name", ["a choice", "tokens"])
def test_a_step_chooses_by_its_one_row(engine: Engine, name: str) -> None:
    """As if the row were the last of its sequence, in a tile of its own; `choices` and `reference` say the same."""
    own = nested(name, "causal").replace("if prefill", "if decode")
    pattern, module = pattern_of(own), engine(own)
    inputs = inputs_of(pattern, Shape(41, 41, 1, 4, 2))
    cache = module.Cache(1, 50, kv_heads=2, qk_dim=16, v_dim=16, page=16, dtype=torch.float64)

    def read_by(run: Callable[..., object], given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: x for key, x in given.items() if key in signature(run).parameters}

    module.prefill(**read_by(module.prefill, cut(pattern, inputs, 0, 40)), cache=cache)
    step = tiles_cut(own, inputs, 40, 41) | {"owned": inputs["owned"][:, :, :1]}
    out = module.decode(**read_by(module.decode, step), cache=cache)
    torch.testing.assert_close(out, dense.attention(pattern, inputs, "decode")[0][:, :, 40:], rtol=1e-10, atol=1e-10)
    if engine.name == "interpreted":
        return  # lists of single rows, one after another
    whole = module.reference(**inputs, phase="decode")
    torch.testing.assert_close(whole[:, :, 40:], out, rtol=1e-10, atol=1e-10)
    lists = module.choices(**read_by(module.choices, inputs), phase="decode")
    assert {x.shape[2] for x in lists.values()} == {41}
    found = module.reference(**inputs, **lists, phase="decode")
    torch.testing.assert_close(found, whole, rtol=1e-10, atol=1e-10)


def test_lists_are_those_of_the_caller(engine: Engine) -> None:
    """What `choices` gives can be passed back, and other lists hold in their place."""
    own = body(SETS["two of them"])
    pattern, module = pattern_of(own), engine(own)
    inputs = inputs_of(pattern, Shape(37, 50, 2, 4, 2))
    lists = module.choices(**inputs)
    expect_lists(lists, pattern, inputs)
    assert lists["best"].shape == (2, 4, 4, 2)  # positions 13 to 49
    whole = module.attention(**inputs)
    torch.testing.assert_close(module.attention(**inputs, **lists), whole, rtol=0, atol=0)
    moved = {"best": lists["best"].roll(1, 2).long(), "mass": lists["mass"][:, :1]}
    wanted, _ = dense.attention(pattern, {**inputs, **moved})
    torch.testing.assert_close(module.attention(**inputs, **moved), wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(module.reference(**inputs, **moved), wanted, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match=r"best: expected 4 row tiles, got 3"):
        module.attention(**inputs, best=lists["best"][:, :, :3])


@pytest.mark.parametrize("origin", [0, 64, 37])
def test_the_cpu_path_multiplies_the_tiles_of_each_head_alone(
    cpu: Engine, origin: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = (
        "rank = dot(compress(16)) best = top_k(2, score = rank, rows = max(64), unit = max(64), share = head) "
        "return attend(best)"
    )
    pattern, module = pattern_of(own), cpu(own)
    inputs = inputs_of(pattern, Shape(320, 320 + origin, 1, 4, 4), torch.float32)
    forward, found = cpu_path.flash_forward, []

    def counted(tile: TileData) -> tuple[Tensor, Tensor]:
        found.append(tile.q.shape[:3].numel() * tile.k.shape[2])
        return forward(tile)

    monkeypatch.setattr(cpu_path, "flash_forward", counted)
    lists = module.choices(**inputs)
    found.clear()
    module.attention(**inputs, **lists)
    first, end, tokens = origin // 64, -(-(320 + origin) // 64), 320 + origin
    rows = [min((i + 1) * 64, tokens) - max(i * 64, origin) for i in range(first, end)]
    units = lists["best"].clamp(min=0) * 64
    keys = ((units + 64).clamp(max=tokens) - units).masked_fill(lists["best"] < 0, 0).sum((0, 1, 3))
    assert sum(found) == sum(own_rows * own_keys for own_rows, own_keys in zip(rows, keys.tolist(), strict=True))


def test_pages_of_the_caller(cpu: Engine) -> None:
    """Requests whose new queries begin with a tile; lists that the caller passes lie by request."""
    own = (
        "causal rank = dot(compress(8)) best = top_k(2, score = rank, rows = max(16), unit = max(16), share = head, "
        "force = last(1)) return attend(best | sliding(3)) if prefill return attend(all)"
    )
    pattern, module = pattern_of(own), cpu(own)
    pages = with_states(module, pattern, filled(pattern, [(37, 21, -1), (40, 40, -1), (17, 1, 0), (0, 0, -1)], 16), 40)
    check(module, pattern, pages, phase="prefill")
    heads = pages.given["q"].shape[1]
    first = module.attend_paged(**pages.given, phase="prefill")[0]
    nothing = torch.full((4, heads, 4, 1), -1)
    out = module.attend_paged(**pages.given, phase="prefill", best=nothing)[0]
    near = module.attend_paged(**pages.given, phase="prefill", best=nothing[..., :0])[0]
    torch.testing.assert_close(out, near, rtol=0, atol=0)
    assert (out - first).abs().max() > 0.1


def test_compiled_for_several_lengths(cpu: Engine) -> None:
    own = body(SETS["two of them"])
    module, pattern = cpu(own), pattern_of(own)
    compiled = torch.compile(module.attention, fullgraph=True, backend="aot_eager")
    for tokens in (37, 61):
        inputs = inputs_of(pattern, Shape(tokens, tokens, 1, 4, 2))
        torch.testing.assert_close(compiled(**inputs), module.attention(**inputs), rtol=0, atol=0)


def test_a_list_is_made_once_for_a_tile(cpu: Engine) -> None:
    own = body(SETS["two of them"])
    pattern, module = pattern_of(own), cpu(own)
    inputs = inputs_of(pattern, Shape(64, 64, 1, 4, 2))
    with recorded(module, pattern) as lists:
        module.attention(**inputs)
    assert lists["best"].shape == (1, 4, 4, 2)
    assert lists["mass"].shape == (1, 4, 2, 8)


class Bug(NamedTuple):
    """One change of the library or of a module, and what must tell."""

    what: str
    old: str
    new: str
    check: Callable[[str, ModuleType], None]
    order: str = ""
    within: str = ""


def _chunks(own: str, module: ModuleType) -> None:
    in_chunks(own, module, (19, 21))


def _whole(own: str, module: ModuleType) -> None:
    checked(own, Shape(37, 50, 1, 4, 2), module)


def _packed(own: str, module: ModuleType) -> None:
    check_packed(own, module, [0, 21, 38])


BUGS = [
    Bug("tiles of lists begin with the call", "tile += floor_div(q_origin, S.ROWS)", "tile += 0", _chunks, "causal"),
    Bug("tiles of the map begin with the call", 'torch.div(q_origin, rows, rounding_mode="floor")', "(q_origin * 0)",
        _chunks, "causal"),
    Bug("the map of another row's tile", "rt.floor_div(q, 16) - t.best_first", "rt.floor_div(q + 8, 16) - t.best_first",
        _whole),
    Bug("the bounds of another row's tile", "tiles.q_last // 16 - t.best_first",
        "tiles.q_first // 16 - t.best_first - 1", _whole),
    Bug("all lists in the place of one", "at(chosen, rows.s, list_head, rows.tile)", "at(chosen, rows.s, list_head, 0)",
        _whole),
    Bug("lists at the rows of a tile", "at(chosen, rows.s, list_head, rows.tile)",
        "at(chosen, rows.s, list_head, rows.begin // S.ROWS)", _whole),
    Bug("units of another tile are allowed", "sets.lists + tile)", "sets.lists + 0)", _whole, within="tokens"),
    Bug("units of another head are allowed", "(tl.cast(list_head, tl.int64) * sets.lists + tile)",
        "(list_head * 0 + tile)", _whole, within="a choice"),
    Bug("forced units are only allowed", "(own > 1) & allowed", "(own > 2) & allowed", _whole, within="tokens"),
    Bug("the first row of a tile is asked", ".view(1, 1, -1, 1)) * rows - 1", ".view(1, 1, -1, 1)) * rows - rows",
        _whole, within="tokens"),
    Bug("sets of the first sequence", "tl.cast(s, tl.int64) * sets.sequence", "tl.cast(s, tl.int64) * 0", _packed,
        within="tokens"),
    Bug("tokens behind the end of a sequence", "(found & (token < keys))", "(found & (token >= 0))", _packed,
        within="tokens that only long sequences have"),
    Bug("the lists of the first sequence", "at(chosen, rows.s, list_head, rows.tile)",
        "at(chosen, rows.s * 0, list_head, rows.tile)", _packed),
]  # fmt: skip


SELDOM = ("lists at the rows of a tile", "units of another head are allowed", "sets of the first sequence")
QUICK = [pytest.param(bug, marks=pytest.mark.full) if bug.what in SELDOM else bug for bug in BUGS]


@pytest.mark.parametrize("bug", QUICK, ids=lambda bug: bug.what)
def test_a_bug_is_seen(kernels: Engine, bug: Bug, tmp_path: Path) -> None:
    own = nested(bug.within) if bug.within else body(SETS["two of them"], bug.order)
    module = kernels(broken(spdsl.compile(text_of(own)).text, bug.old, bug.new, tmp_path))
    with pytest.raises(AssertionError):
        bug.check(own, module)


@pytest.mark.parametrize("check, order", [(_chunks, "causal"), (_whole, ""), (_packed, "")])
def test_the_same_checks_pass_without_a_bug(kernels: Engine, check: Callable[..., None], order: str) -> None:
    own = body(SETS["two of them"], order)
    check(own, kernels(own))


@pytest.mark.parametrize("check, within", [(_whole, "tokens"), (_whole, "a choice"), (_packed, "tokens")])
def test_checks_of_other_sets_pass_without_a_bug(kernels: Engine, check: Callable[..., None], within: str) -> None:
    check(nested(within), kernels(nested(within)))
