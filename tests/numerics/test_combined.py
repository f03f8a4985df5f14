"""Words that say nothing of each other, in one pattern: maps of tiles, queries of cells, one list for all, skips."""

from __future__ import annotations

import pytest

from tests.numerics.cases import Shape
from tests.numerics.conftest import Engine
from tests.numerics.test_rows_of_all import check_calls, check_lengths
from tests.numerics.test_selection import checked
from tests.numerics.test_selection_layouts import check_packed, check_padded

PARTS = (
    "lines = top_k(5, score = softmax(dot(kv, query = tail(q, 12))), rows = sum(all), share = head, {lines}) "
    "cells = compress(8) q_mean = compress(16, of = q, by = mean, partial = keep) "
    "q_short = compress(4, of = q, by = max, partial = keep) "
    "tiles = top_k(2, score = dot(cells), rows = max(32), unit = max(16), share = head) "
    "pooled = top_k(2, score = dot(cells, query = q_mean), share = head, {pooled}) "
    "pairs = top_p(0.6, score = softmax(dot(cells, query = q_mean)), rows = sum(32), share = head, {pairs}) "
    "short = threshold(0.5, score = dot(cells, query = q_short), rows = max(16), unit = max(24), share = max(group), "
    "least = 1, most = 2) "
)


def body(text: str, order: str = "", pooled: str = "", pairs: str = "", lines: str = "", more: str = "") -> str:
    parts = PARTS.format(pooled=pooled, pairs=pairs, lines=lines).replace(", )", ")")
    answer = f"return attend({text}{more}) if prefill return attend(all)" if order else f"return attend({text}{more})"
    tensors = {"column[": "column = tensor(token, bool)", "style[": "style = tensor(head, int)"}
    read = " ".join(tensor for use, tensor in tensors.items() if use in parts + answer)
    return f"{order} allow(W404) {read} {parts} {answer}"


SETS = {
    "all in one set": ("(tiles & ~pooled | lines) - short | pairs & sliding(9)", {}),
    "a complement of one list": ("~lines & sliding(30) | pooled", {}),
    "by head": ("lines & where(style[h] % 2 == 0) | (pairs | short) & where(style[h] % 2 == 1)", {}),
    "lines within tokens": ("lines | sliding(3)", {"lines": "within = where(column[k]) | first(3), force = last(2)"}),
    "cells within tokens": ("pooled | sliding(3)", {"pooled": "within = where(column[k])"}),
    "cells within tiles": ("pooled | pairs", {"pooled": "within = ~tiles", "pairs": "force = tiles & first(3)"}),
    "cells within lines": ("pooled | pairs", {"pooled": "within = lines", "pairs": "within = ~lines"}),
}


@pytest.mark.parametrize("name", SETS)
def test_sets(engine: Engine, name: str) -> None:
    text, more = SETS[name]
    shape = Shape(21, 57, 1, 4, 2) if engine.name == "interpreted" else Shape(61, 90, 2, 4, 2)
    checked(body(text, **more), shape, engine(body(text, **more)))


@pytest.mark.parametrize("name", SETS)
def test_packed_and_padded(engine: Engine, name: str) -> None:
    text, more = SETS[name]
    check_packed(body(text, **more), engine(body(text, **more)), [0, 21, 21, 38])
    check_padded(body(text, **more), engine(body(text, **more)), [21, 0, 18])


@pytest.mark.parametrize("name", SETS)
def test_prompts(engine: Engine, name: str) -> None:
    text, more = SETS[name]
    own = body(text, "causal", **more)
    check_calls(own, engine(own), 16)
    if "tensor(" not in own:
        check_lengths(own, engine(own))


SKIPS = {
    "tiles": "skip = below(0.3, rows = 16, unit = 16)",
    "short tiles, by group": "skip = below(0.3, rows = 8, unit = 16, share = group)",
}


@pytest.mark.parametrize("name", SETS)
def test_skips(engine: Engine, name: str) -> None:
    text, more = SETS[name]
    own = body(text, "causal", more=f", {SKIPS['tiles']}", **more)
    check_calls(own, engine(own), 16)


@pytest.mark.parametrize("name", ["all in one set", "cells within lines"])
def test_more_queries_than_keys(engine: Engine, name: str) -> None:
    text, more = SETS[name]
    checked(body(text, **more), Shape(40, 17, 1, 4, 2), engine(body(text, **more)))
