"""The lists of names in `clashes` cover what the templates use: a new local of a template must be added there."""

from __future__ import annotations

import pytest

import spdsl
from spdsl.codegen import render
from spdsl.passes.clashes import ARGUMENT_WORDS, KERNEL_WORDS, PREFIX_WORDS, TAIL_WORDS
from tests.codegen.hazards import PATTERN, hazards

OWN = {"kv", "kv_keys", "kv_lists", "h", "k", "v"}  # of the pattern itself


def public(names: set[str]) -> set[str]:
    """No input may begin with an underscore."""
    return {name for name in names if not name.startswith("_")}


def test_every_name_of_the_templates_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "formatted", lambda made: made)
    found = hazards(spdsl.compile(PATTERN).text)
    assert len(found.arguments) > 50
    assert public(found.arguments) - ARGUMENT_WORDS - OWN == set()
    assert public(found.kernels) - KERNEL_WORDS - OWN == set()
    assert public(found.prefixes) - PREFIX_WORDS == set()
    assert found.tails - TAIL_WORDS == set()
