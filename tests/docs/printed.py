"""What the documents show of commands: blocks that begin with `$ spdsl`, as they come out at 80 columns.

`python -m tests.docs.printed` writes what the commands print today into the documents.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path

from click.testing import CliRunner

from spdsl.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", ROOT / "DESIGN.md", *sorted((ROOT / "docs").glob("*.md")))
COLUMNS = 80
_BLOCK = re.compile(r"^```\n\$ spdsl (.*)\n((?:.*\n)*?)^```$", re.MULTILINE)
_SOURCE = re.compile(r"^```spat\n((?:.*\n)*?)^```$", re.MULTILINE)


def blocks(page: Path) -> list[tuple[str, str]]:
    """(arguments, what is shown) of each block."""
    return [(found[1], found[2]) for found in _BLOCK.finditer(page.read_text(encoding="utf-8"))]


@contextlib.contextmanager
def beside(page: Path) -> Iterator[Path]:
    """A folder to run commands of the page in: the patterns, and the page's own as `<name>.spat`."""
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        folder = Path(name)
        (folder / "patterns").symlink_to(ROOT / "patterns")
        for text in _SOURCE.findall(page.read_text(encoding="utf-8")):
            own = re.search(r"^pattern (\w+)", text, re.MULTILINE)
            if own is not None:
                (folder / f"{own[1]}.spat").write_text(text, encoding="utf-8")
        yield folder


def output(page: Path, arguments: str) -> str:
    """What the command prints, without spaces at the ends of lines and empty lines at its end."""
    with beside(page):
        done = CliRunner().invoke(main, shlex.split(arguments), env={"COLUMNS": str(COLUMNS)})
    if done.exit_code:
        raise RuntimeError(f"spdsl {arguments}: {done.output}")
    return "".join(f"{line.rstrip()}\n" for line in done.output.rstrip().splitlines())


def rewrite(page: Path) -> None:
    def anew(found: re.Match[str]) -> str:
        return f"```\n$ spdsl {found[1]}\n{output(page, found[1])}```"

    page.write_text(_BLOCK.sub(anew, page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    for each in PAGES:
        rewrite(each)
