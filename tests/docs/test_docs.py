"""The documents say what is built: their patterns compile, and every word and code is in them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import spdsl
from spdsl.catalogue import entries
from spdsl.compiler import pattern_names
from spdsl.diagnostics import Source
from spdsl.primitives.planned import PLANNED
from spdsl.primitives.registry import WORDS
from spdsl.primitives.word import Word

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
LANGUAGE = (ROOT / "docs" / "language.md").read_text(encoding="utf-8")


def blocks(page: Path) -> list[str]:
    """The sources of a page: what stands between ```spat and ```."""
    return re.findall(r"^```spat\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


SOURCES = [pytest.param(text, id=f"{page.stem}-{i}") for page in PAGES for i, text in enumerate(blocks(page))]


@pytest.mark.parametrize("text", SOURCES)
def test_patterns_compile(text: str) -> None:
    for name in pattern_names(Source(text)):
        made = spdsl.compile(text, name)
        assert not made.diagnostics, [found.message for found in made.diagnostics]
        assert "def decode(" in made.text


def test_language_has_an_example_of_every_word() -> None:
    examples = "\n".join(blocks(ROOT / "docs" / "language.md"))
    missing = [word for word in WORDS if not re.search(rf"\b{word}\(", examples)]
    assert missing == []


@pytest.mark.parametrize("word", WORDS.values(), ids=lambda word: word.name)
def test_language_lists_every_parameter(word: Word) -> None:
    heading = next((line for line in LANGUAGE.splitlines() if line.startswith(f"### `{word.name}(")), None)
    assert heading is not None, f"docs/language.md has no section on {word.name}"
    for parameter in word.parameters:
        assert re.search(rf"\b{NAMES.get((word.name, parameter.name), parameter.name)}\b", heading), parameter.name


NAMES = {("cover", "members"): "set"}  # where a plainer name stands in the document


def test_language_lists_every_planned_word() -> None:
    section = LANGUAGE.split("## Words that are not built yet")[-1]
    assert [word for word in PLANNED if f"`{word}`" not in section] == []
    assert [word for word in WORDS if f"`{word}`" in section] == []


def test_errors_lists_every_code() -> None:
    rows = [f"| {entry.code} `{entry.name}` | {entry.title} |" for entry in entries().values()]
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| [EW]\d.*$", text, re.MULTILINE) == rows


def test_readme_lists_every_pattern() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(path.stem for path in (ROOT / "patterns").glob("*.spat"))


@pytest.mark.parametrize("page", [*PAGES, ROOT / "DESIGN.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    broken = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert broken == []
