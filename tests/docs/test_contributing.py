"""What CONTRIBUTING.md says of a new pool and a new score: few files, and they are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
MOST = 6  # files of the product


@pytest.mark.parametrize("title, own", [("A new pool", "min"), ("A new score", "cosine")])
def test_a_record_takes_few_files(title: str, own: str) -> None:
    section = TEXT.split(f"## {title}\n")[1].split("\n## ")[0]
    files = re.findall(r"^\| `([\w./]+)` \|", section, re.MULTILINE)
    assert 0 < len(files) <= MOST
    for file in files:
        assert own in (ROOT / file).read_text(encoding="utf-8") or file.endswith("planned.py"), file


def test_no_other_file_knows_a_pool_by_name() -> None:
    """Those that no other thing has: `mean` and `max` are reductions of scores, too."""
    apart = ("primitives/pools/", "runtime/pools/", "oracle/compress.py")
    texts = [*(ROOT / "spdsl").rglob("*.py"), *(ROOT / "templates").rglob("*.jinja")]
    known = [path for path in texts if re.search(r"[\"'](weighted|mlp)[\"']", path.read_text(encoding="utf-8"))]
    assert [path for path in known if not any(part in path.as_posix() for part in apart)] == []
