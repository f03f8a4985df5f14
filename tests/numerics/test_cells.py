"""Cells that begin before their place, and the short last one: results, gradients and phases against the oracle."""

from __future__ import annotations

import pytest
import torch

from spdsl.ir.pattern import Grid, Stream
from spdsl.oracle.compress import cells, entries
from spdsl.oracle.dense import sizes_of, visible
from spdsl.runtime.call.layouts import Options, layout_of
from spdsl.runtime.entries.entries import Cells, entry_count
from tests.numerics.cases import Shape, inputs_of
from tests.numerics.conftest import Engine
from tests.numerics.patterns import pattern_of
from tests.numerics.selected import by_rank, picked
from tests.numerics.test_selection import checked
from tests.numerics.test_selection_layouts import check_chunks, check_packed, check_padded

WAYS = ("mean", "max", "min", "weighted", "mlp", "softmax(z)")


def every_way(grid: str, more: str = "causal", when: str = "") -> str:
    """A branch for each way to make entries."""
    made = " ".join(f"e{i} = compress({grid}, by = {way})" for i, way in enumerate(WAYS))
    return f"{more} z = stream() {made} return gate({', '.join(f'attend(e{i})' for i in range(len(WAYS)))}) {when}"


EARLY = {before: every_way(f"8, 4, before = {before}") for before in (1, 4, 7)}
GAPLESS = every_way("5, before = 3")
CUT = {
    "whole cells": every_way("8, 4, partial = keep", when="if train"),
    "early": every_way("8, 4, before = 4, partial = keep", when="if train"),
    "just at their place": every_way("6, before = 5, partial = keep", when="if train"),
    "not causal": every_way("8, 4, before = 4, partial = keep", "", "if train"),
}


@pytest.mark.parametrize("before", EARLY)
def test_cells_that_begin_early(engine: Engine, before: int) -> None:
    """Before the first cell is whole, when it becomes so, and later; in few rows, too."""
    body = EARLY[before]
    for rows, keys in ((8 - before, 8 - before), (21, 21), (3, 26)) if engine.name == "cpu" else ((19, 19),):
        checked(body, Shape(rows, keys, heads=4, kv_heads=2), engine(body))


@pytest.mark.parametrize("name", CUT)
def test_the_last_cell_is_cut_by_the_end(engine: Engine, name: str) -> None:
    """With no whole cell, just one, one that ends with the sequence, and tokens behind it."""
    body = CUT[name]
    for keys in (1, 3, 8, 21, 24) if engine.name == "cpu" else (10,):
        checked(body, Shape(keys, keys, heads=4, kv_heads=2), engine(body))
    checked(body, Shape(2, 11), engine(body))


@pytest.mark.parametrize("body", [EARLY[4], GAPLESS, CUT["early"]])
def test_packed_sequences_are_separate_runs(engine: Engine, body: str) -> None:
    check_packed(body, engine(body), [0, 9, 9, 10, 13, 31] if engine.name == "cpu" else [0, 9, 10, 17])


@pytest.mark.parametrize("body", [EARLY[7], CUT["early"]])
def test_left_padded_rows_count_from_their_first_token(engine: Engine, body: str) -> None:
    check_padded(body, engine(body), [19, 1, 0, 6] if engine.name == "cpu" else [11, 6])


@pytest.mark.parametrize("page", [None, 16], ids=["contiguous", "paged"])
@pytest.mark.parametrize("before", EARLY)
def test_every_step_is_attention(cpu: Engine, before: int, page: int | None) -> None:
    """Token by token from the first one on, and in chunks that end within cells."""
    check_chunks(EARLY[before], cpu(EARLY[before]), page, [], 21, 2)
    check_chunks(EARLY[before], cpu(EARLY[before]), page, [1, 2, 9, 16], 2, 2)


@pytest.mark.parametrize("before, chunks, decoded", [(4, [], 6), (7, [3, 14], 2)])
def test_steps_of_kernels(kernels: Engine, before: int, chunks: list[int], decoded: int) -> None:
    check_chunks(EARLY[before], kernels(EARLY[before]), 16, chunks, decoded, 1)


SCORED = {
    "sum": picked("top_k(2, score = mass(coarse), unit = 16, force = last(1))", "8, 4, before = 4, by = weighted"),
    "max": by_rank("top_k(2, score = rank, share = max(group), unit = max(16))", compress="12, 8, before = 11"),
    "mean": by_rank("top_k(2, score = rank, share = head, unit = mean(16))", compress="16, before = 9"),
    "cut sum": picked("top_k(2, score = mass(coarse), unit = 16)", "12, 8, before = 5, partial = keep") + " if train",
    "cut max": by_rank(
        "top_k(2, score = rank, share = head, unit = max(16))", "", compress="24, 8, before = 9, partial = keep"
    )
    + " if train",
}


@pytest.mark.parametrize("name", SCORED)
def test_choices_by_entries_that_begin_early(engine: Engine, name: str) -> None:
    """The lists, too, are those of the oracle, which counts the tokens that a unit and an entry share."""
    body = SCORED[name]
    checked(body, Shape(17 if engine.name == "interpreted" else 75, 75, heads=4, kv_heads=2), engine(body))


@pytest.mark.parametrize("name", ["sum", "max"])
def test_chunks_of_choices(engine: Engine, name: str) -> None:
    chunks, decoded = ([3, 17, 16], 3) if engine.name == "cpu" else ([37], 2)
    check_chunks(SCORED[name], engine(SCORED[name]), 16, chunks, decoded, 1)


@pytest.mark.parametrize("grid", ["8, 4", "8, 4, before = 7", "6, before = 5, partial = keep"])
def test_bare_scores_are_those_of_the_entries(cpu: Engine, grid: str) -> None:
    """As many as there are entries, also where cells overlap."""
    body = f"causal e = compress({grid}) full = attend(all) return full, softmax(dot(e)) if train"
    for keys in (6, 22):
        checked(body, Shape(keys, keys), cpu(body))


def test_training_and_the_cache_may_differ(cpu: Engine) -> None:
    """The entries that only training sees are in no cache."""
    body = "causal e = compress(8, 4, partial = keep) w = compress(8, 4) return attend(e) if train return attend(w)"
    module, pattern = cpu(body), pattern_of(body)
    checked(body, Shape(22, 22), module)
    assert "e" not in module.Cache(1, 32, kv_heads=1, qk_dim=16, v_dim=16).k
    check_chunks(body, module, 16, [5, 14], 3, 1)
    assert [stream.name for stream in pattern.kept] == ["w"]


@pytest.mark.parametrize("before", [0, 1, 4, 7])
@pytest.mark.parametrize("partial", ["drop", "keep"])
def test_an_entry_is_seen_once_its_last_token_is(before: int, partial: str) -> None:
    """By the tokens of each cell, one by one; three ways to count the entries agree."""
    pattern = pattern_of(f"causal return attend(compress(8, 4, before = {before}, partial = {partial})) if train")
    grid = Grid(8, 4, before, partial == "keep")
    (term,) = pattern.softmaxes()[0].terms
    for keys in range(1, 30):
        found = cells(grid, keys)
        assert (
            len(found)
            == entries(grid, keys)
            == grid.count(keys)
            == entry_count(keys, Cells(8, 4, before, grid.partial))
        )
        inputs = inputs_of(pattern, Shape(keys, keys))
        seen = visible(pattern, term, inputs, sizes_of(pattern, inputs))[0, 0]
        wanted = [[max(range(keys)[own]) <= q for own, _ in found] for q in range(keys)]
        assert seen.tolist() == wanted


def test_cells_at_their_place_are_the_same_without_before(cpu: Engine) -> None:
    """`before` of so many strides moves the entries: those behind the first ones are the same."""
    early, plain = every_way("8, 4, before = 4"), every_way("8, 4")
    stream = next(x for x in pattern_of(early).inputs if isinstance(x, Stream) and x.compress)
    assert stream.grid == Grid(8, 4, 4)
    inputs = inputs_of(pattern_of(early), Shape(24, 24))
    layout = layout_of(inputs["k"], inputs["k"], Options())
    moved, own = (
        cpu(body)._entries(cpu(body).Inputs(**{name: x for name, x in inputs.items() if name != "gates"}), layout)
        for body in (early, plain)
    )
    for i in range(len(WAYS)):
        torch.testing.assert_close(getattr(moved, f"k_e{i}")[:, :, 1:], getattr(own, f"k_e{i}"), rtol=0, atol=1e-12)
