"""The lists of names in `clashes` cover what the templates use: a new local of a template must be added there."""

from __future__ import annotations

import pytest

import spdsl
from spdsl.codegen import render
from spdsl.passes.clashes import ARGUMENT_WORDS, KERNEL_WORDS, PREFIX_WORDS, TAIL_WORDS
from tests.codegen.hazards import PATTERN, hazards

# Of the pattern itself, and names that start with an underscore, which no input may have.
OWN = {"kv", "kv_keys", "kv_lists", "_append", "_check", "_prepare", "_", "h", "k", "v"}


def test_every_name_of_the_templates_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "formatted", lambda made: made)
    found = hazards(spdsl.compile(PATTERN).text)
    assert len(found.arguments) > 50
    assert found.arguments - ARGUMENT_WORDS - OWN == set()
    assert found.kernels - KERNEL_WORDS - OWN == set()
    assert {name for name in found.prefixes if not name.startswith("_")} - PREFIX_WORDS == set()
    assert found.tails - TAIL_WORDS == set()
