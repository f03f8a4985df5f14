"""The walk of DESIGN.md: its code is that of the module, its numbers are what the module says."""

from __future__ import annotations

import doctest
import re

import pytest

import spdsl
from tests.docs.printed import ROOT, beside

PAGE = ROOT / "DESIGN.md"
WALK = PAGE.read_text(encoding="utf-8").partition("\n## 1. ")[0]
BLOCKS = re.findall(r"^```python\n(.*?)^```$", WALK, re.MULTILINE | re.DOTALL)
CODE = [block for block in BLOCKS if not block.startswith(">>>")]
SESSIONS = [block for block in BLOCKS if block.startswith(">>>")]


def test_every_stage_is_shown() -> None:
    assert re.findall(r"--emit (\w+)$", WALK, re.MULTILINE) == ["tree", "pattern", "aligned", "plan"]
    assert CODE
    assert SESSIONS


@pytest.mark.parametrize("block", CODE)
def test_code_is_that_of_the_module(block: str) -> None:
    with beside(PAGE):
        assert block in spdsl.compile("near.spat").text


@pytest.mark.parametrize("block", SESSIONS)
def test_numbers_are_those_of_the_module(block: str) -> None:
    with beside(PAGE):
        module = spdsl.load("near.spat")
    session = doctest.DocTestParser().get_doctest(block, {"module": module}, PAGE.name, None, None)
    assert doctest.DocTestRunner().run(session).failed == 0
