"""`python -m benchmarks.compile_time [FILE...]`: CPU seconds and memory of `check` and of `compile`.

Without files: the shipped patterns, and sources at the limits or beyond (tests/test_limits.py). Each source has a
process of its own; what all share (imports, the grammar, a first small pattern) is done before its time begins.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
ALONE = """
import json, sys
from tests.fuzz.examine import examine
examine("pattern p { causal return attend(sliding(4)) }", compiles=True)
found = examine(sys.stdin.read(), compiles=True)
print(json.dumps([found.outcome, found.seconds, found.megabytes, found.wrong]))
"""


def sources(files: list[str]) -> Iterator[tuple[str, str]]:
    """(name, text)"""
    if files:
        yield from ((Path(file).stem, Path(file).read_text(encoding="utf-8")) for file in files)
        return
    from tests.test_limits import ALLOWED, REFUSED

    yield from ((path.stem, path.read_text(encoding="utf-8")) for path in sorted((ROOT / "patterns").glob("*.spat")))
    yield from ((f"! {name}", text) for name, (text, *_) in REFUSED.items())
    yield from ((f"! {name}", text) for name, text in ALLOWED.items())


def main() -> int:
    """0 when all are within the limits."""
    table = Table(box=None, pad_edge=False)
    for heading in ("source", "outcome", "check", "with GPU", "compile", "MB"):
        table.add_column(heading, justify="left" if heading in ("source", "outcome") else "right", no_wrap=True)
    failed = 0
    for name, text in sources(sys.argv[1:]):
        done = subprocess.run(
            [sys.executable, "-c", ALONE], input=text, capture_output=True, text=True, cwd=ROOT, check=True
        )
        outcome, seconds, megabytes, wrong = json.loads(done.stdout)
        failed += bool(wrong)
        cells = (f"{seconds[what]:.3f}" if what in seconds else "" for what in ("check", "check --target", "compile"))
        table.add_row(name, outcome[:20], *cells, f"{megabytes:.0f}")
    Console(width=80).print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
