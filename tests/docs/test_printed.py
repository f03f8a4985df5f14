"""Tables and stages in the documents are what the commands print; `python -m tests.docs.printed` renews them."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.docs.printed import COLUMNS, PAGES, ROOT, blocks, output

CASES = [(page, arguments, shown) for page in PAGES for arguments, shown in blocks(page)]
TABLES = [case for case in CASES if "--emit" not in case[1]]  # a stage has lines as long as its expressions
COMPILING = [case for case in CASES if "--report" in case[1]]
OTHERS = [case for case in CASES if "--report" not in case[1]]
SOME = 8  # registers, or what they leave room for
KEPT = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("triton=="))


def test_there_are_tables() -> None:
    assert {page.name for page, _, _ in OTHERS} >= {"cost.md", "DESIGN.md"}
    assert {page.name for page, _, _ in COMPILING} == {"deploy.md"}


@pytest.mark.parametrize("page, arguments, shown", TABLES, ids=lambda x: x.name if isinstance(x, Path) else None)
def test_tables_fit_80_columns(page: Path, arguments: str, shown: str) -> None:
    assert max(map(len, shown.splitlines())) <= COLUMNS
    assert "…" not in shown


@pytest.mark.parametrize("page, arguments, shown", OTHERS, ids=lambda x: x.name if isinstance(x, Path) else None)
def test_it_is_what_the_command_prints(page: Path, arguments: str, shown: str) -> None:
    assert output(page, arguments) == shown


@pytest.mark.crosscompile
@pytest.mark.parametrize("page, arguments, shown", COMPILING, ids=lambda x: x.name if isinstance(x, Path) else None)
def test_it_is_the_report_of_the_kernels(page: Path, arguments: str, shown: str) -> None:
    """The same kernels, words and columns; numbers as they are, but for some registers that a line of code may move.

    Another version of triton than the one that the table is from gives a table of the same kernels.
    """
    found = output(page, arguments)
    assert kernels(found) == kernels(shown)
    if KEPT.startswith(f"triton=={version('triton')}"):
        assert words(found) == words(shown)
        near = [
            abs(one - other) <= max(SOME, other // 10) for one, other in zip(*map(numbers, (found, shown)), strict=True)
        ]
        assert all(near)


def kernels(text: str) -> list[str]:
    return [line.split("│")[1] for line in text.splitlines() if line.startswith("│")]


def words(text: str) -> list[str]:
    return re.sub(r"[0-9][0-9,.]*", "#", text).split()


def numbers(text: str) -> list[float]:
    return [float(number.replace(",", "").rstrip(".")) for number in re.findall(r"[0-9][0-9,.]*", text)]
