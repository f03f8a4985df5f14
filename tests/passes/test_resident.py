"""Which tokens later queries may see: the text of a pattern, and what of it is resident."""

from __future__ import annotations

import pytest

from spdsl.api import source_of
from spdsl.compiler import plan_of
from spdsl.diagnostics import Source
from spdsl.passes.resident import resident

PAIRS = {
    "causal return attend(sliding(8))": (0, 8),
    "causal return attend(first(4) | sliding(20))": (4, 20),
    "causal return attend(first(4))": (4, 1),
    "causal near = attend(sliding(9)) far = attend(first(18) - sliding(9)) return merge(near, far)": (18, 9),
    "causal return attend(all)": None,
    "causal return attend(where((q - k) % 4 == 0))": None,
    "causal flag = tensor(token, bool) return attend(where(flag[k]))": None,
    "causal a = given(unit = 16, rows = 1) return attend(a)": None,
}
LIBRARY = {"streaming_llm": (4, 1020), "sliding_window": (0, 4096), "causal": None, "nsa": None, "alibi": None}


@pytest.mark.parametrize("body", PAIRS)
def test_written(body: str) -> None:
    assert resident(plan_of(Source(f"pattern a {{ {body} }}"), None, {})) == PAIRS[body]


@pytest.mark.parametrize("name", LIBRARY)
def test_library(name: str) -> None:
    assert resident(plan_of(source_of(f"patterns/{name}.spat"), None, {})) == LIBRARY[name]
