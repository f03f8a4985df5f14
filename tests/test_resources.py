"""Data folders are found inside an installed package first, beside it in a checkout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from spdsl import resources


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(resources, "_PACKAGE", tmp_path / "spdsl")
    (tmp_path / "spdsl").mkdir()
    resources.folder.cache_clear()
    yield tmp_path / "spdsl"
    resources.folder.cache_clear()


def test_inside_first(package: Path) -> None:
    (package.parent / "grammar").mkdir()
    (package / "grammar").mkdir()
    assert resources.folder("grammar") == package / "grammar"


def test_beside_otherwise(package: Path) -> None:
    (package.parent / "grammar").mkdir()
    (package.parent / "grammar" / "spat.lark").write_text("start: \u00e9", encoding="utf-8")
    assert resources.folder("grammar") == package.parent / "grammar"
    assert resources.text("grammar", "spat.lark") == "start: \u00e9"


def test_nowhere(package: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`patterns` is missing"):
        resources.folder("patterns")


def test_this_checkout_is_complete() -> None:
    for name in ("grammar", "templates", "patterns"):
        assert resources.folder(name).is_dir()
    assert "pattern:" in resources.text("grammar", "spat.lark")
