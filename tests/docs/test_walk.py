"""The walk of DESIGN.md shows every stage; its code is that of the module, its numbers are what the module says."""

from __future__ import annotations

import doctest
import re

import pytest

import spdsl
from tests.docs.printed import MODULES, ROOT, beside, with_code

PAGE = ROOT / "DESIGN.md"
WALK = PAGE.read_text(encoding="utf-8").partition("\n## 1. ")[0]
SESSIONS = re.findall(r"^```python\n(>>>.*?)^```$", WALK, re.MULTILINE | re.DOTALL)


def test_every_stage_is_shown() -> None:
    assert re.findall(r"--emit (\w+)$", WALK, re.MULTILINE) == ["tree", "pattern", "aligned", "plan", "steps"]
    assert WALK.count("```python\n@rt.jit\n") == 3
    assert SESSIONS


@pytest.mark.parametrize("page", MODULES)
def test_code_is_that_of_the_module(page: str) -> None:
    assert with_code(ROOT / page) == (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("session", SESSIONS)
def test_numbers_are_those_of_the_module(session: str) -> None:
    with beside(PAGE):
        module = spdsl.load("near.spat")
    case = doctest.DocTestParser().get_doctest(session, {"module": module}, PAGE.name, None, None)
    assert doctest.DocTestRunner().run(case).failed == 0
