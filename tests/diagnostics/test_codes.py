"""Every code of the catalogue: its bad example raises exactly that code, its fixed form compiles clean."""

from __future__ import annotations

from fractions import Fraction

import pytest

from spdsl import compiler
from spdsl.catalogue import Entry, entries
from spdsl.checks.view import Setting
from spdsl.diagnostics import Source
from spdsl.targets import find

OVERRIDES = {"E501": {"window": Fraction(512)}, "E502": {"stride": Fraction(0)}}  # as the entries' texts say
TARGETS = {"E522": "rtx4090", "W511": "h200"}  # likewise


def codes(entry: Entry, text: str, params: dict[str, Fraction]) -> list[str]:
    setting = Setting(tuple(find(name) for code, name in TARGETS.items() if code == entry.code))
    return [found.code for found in compiler.check(Source(text), params, setting)]


@pytest.mark.parametrize("entry", entries().values(), ids=lambda entry: entry.code)
def test_bad_example_raises_its_code_alone(entry: Entry) -> None:
    assert set(codes(entry, entry.bad * entry.repeated, OVERRIDES.get(entry.code, {}))) == {entry.code}


@pytest.mark.parametrize("entry", entries().values(), ids=lambda entry: entry.code)
def test_fixed_form_is_clean(entry: Entry) -> None:
    params = OVERRIDES[entry.code] if entry.code == "E501" else {}
    assert codes(entry, entry.fixed, params) == []
