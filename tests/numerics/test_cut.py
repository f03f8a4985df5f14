"""Lists that are cut from scores in memory, in modules: longer than a kernel ranks, without a bound, of tiles of rows.

Every choice may be cut: with room for no unit in registers, any pattern is.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

import spdsl
from spdsl.oracle import dense
from spdsl.passes import selection
from tests.numerics.cases import Found, Shape, assert_same, cut, inputs_of, nan_cache, parts_of
from tests.numerics.conftest import Engine
from tests.numerics.patterns import module_from, pattern_of, text_of
from tests.numerics.selected import SELECTED, by_rank, expect_lists, recorded
from tests.numerics.test_selection import checked, shape_of
from tests.numerics.test_selection_layouts import CHUNKABLE, ENDS, check_chunks, check_packed, check_padded


@cache
def cut_text(body: str) -> str:
    """The module of a pattern all of whose lists are cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "MOST_RANKED", 0)
        text = spdsl.compile(text_of(body)).text
    assert "rt.ranked(" not in text
    return text


def cut_module(body: str, folder: Path) -> ModuleType:
    return module_from(cut_text(body), folder / "generated.py")


# Several entries to a unit and units to an entry, entries that begin early, a limit that forced units pass, biases.
ALL = ["nsa", "mean", "forced above room", "threshold of at least", "units of 48", "cells that begin early", "bias"]
LONG = ["moba", "infllm_v2", "msa_minimax", "max", "weighted", "within", "two choices", "units of tokens", "threshold",
        "least and most", "units of four cells", "heads apart, all words", "no order", "sink"]  # fmt: skip


@pytest.mark.parametrize("name", [*ALL, *(pytest.param(name, marks=pytest.mark.full) for name in LONG)])
def test_lists_are_those_of_the_reference(kernels: Engine, name: str, tmp_path: Path) -> None:
    body = SELECTED[name]
    checked(body, replace(shape_of(body, 21), keys=75), kernels(cut_module(body, tmp_path)))


@pytest.mark.parametrize("name", ["nsa", "threshold of at least"])
def test_packed_and_padded(kernels: Engine, name: str, tmp_path: Path) -> None:
    module = kernels(cut_module(SELECTED[name], tmp_path))
    check_packed(SELECTED[name], module, ENDS)
    check_padded(SELECTED[name], module, [21, 0, 18])


@pytest.mark.parametrize("name, page", [("nsa", 16), ("threshold of at least", None)])
def test_chunks_and_steps(kernels: Engine, name: str, page: int | None, tmp_path: Path) -> None:
    check_chunks(CHUNKABLE[name], kernels(cut_module(CHUNKABLE[name], tmp_path)), page, [3, 17], 3, 1)


@pytest.mark.parametrize("name", ["heads apart, any number", "at least of a logit"])
def test_steps_of_a_threshold_without_most(kernels: Engine, name: str) -> None:
    check_chunks(SELECTED[name], kernels(SELECTED[name]), 16, [20], 2, 2)


TILES = {
    "of four": ("top_k(2, score = rank, share = max(group), unit = max(16), rows = sum(4), force = last(1))", ""),
    "of three": ("threshold(0.05, score = softmax(rank), unit = mean(16), rows = mean(3), least = 1, most = 3)", ""),
    "causal": ("top_k(3, score = rank, share = mean(group), unit = sum(16), rows = max(9), force = sink(1))", "causal"),
    "of a head": ("threshold(-0.2, score = rank, share = head, unit = max(16), rows = max(7))", "causal"),
}  # fmt: skip


def tiles(name: str) -> str:
    """With an order a later query decides for earlier ones, so only in generation."""
    rule, more = TILES[name]
    body = by_rank(rule, more)
    return body + " if prefill return attend(sliding(5))" if more else body


@pytest.mark.parametrize("name", TILES)
def test_tiles_of_rows(kernels: Engine, name: str) -> None:
    """Of chunks that begin and end within a tile, and of a step."""
    body, shape = tiles(name), Shape(35, 35, batch=2)
    module, pattern = kernels(body), pattern_of(body)
    inputs, cache = inputs_of(pattern, shape), nan_cache(module, shape, 48, 16)
    for first, end, phase in ((0, 18, "prefill"), (18, 34, "prefill"), (34, 35, "decode")):
        call = getattr(module, phase)(**cut(pattern, inputs, first, end), cache=cache, return_lse=True)
        seen = {**cut(pattern, inputs, 0, end), "q": inputs["q"][:, :, first:end]}
        assert_same(Found(parts_of(call)), Found(dense.results(pattern, seen, phase)))


@pytest.mark.parametrize("name", ["of four", "of three"])
def test_tiles_of_rows_in_training(kernels: Engine, name: str) -> None:
    checked(tiles(name), Shape(21, 52), kernels(tiles(name)))


@pytest.mark.parametrize("name", ["of four", "of three"])
def test_tiles_of_packed_rows(kernels: Engine, name: str) -> None:
    check_packed(tiles(name), kernels(tiles(name)), ENDS)


def test_nan_of_one_row_is_no_score_of_its_tile(kernels: Engine) -> None:
    body = by_rank("top_k(2, score = rank, share = max(group), unit = max(16), rows = max(8), force = last(1))", "")
    pattern, module = pattern_of(body), kernels(body)
    inputs = inputs_of(pattern, Shape(40, 40))
    inputs["q"][:, :, 11] = torch.nan
    with recorded(module, pattern) as lists:
        module.attention(**inputs)
    assert lists["chosen"][0, 0, 9].tolist() == [0, -1]
    assert (lists["chosen"][0, 0, 18] >= 0).all()
    expect_lists(lists, pattern, inputs)


def test_a_list_of_more_than_256_units(kernels: Engine) -> None:
    """Two queries at the end of many keys."""
    body = by_rank("top_k(258, score = rank, share = head, unit = max(16), force = sink(1))", compress="16")
    checked(body, Shape(2, 4300, heads=1, kv_heads=1), kernels(body), backward=False)
