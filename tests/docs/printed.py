"""What documents show of commands (blocks that begin with `$ spdsl`, as they come out at 80 columns) and of modules.

`python -m tests.docs.printed` writes what the commands and modules print today into the documents.
"""

from __future__ import annotations

import ast
import contextlib
import re
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path

from click.testing import CliRunner

import spdsl
from spdsl.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", ROOT / "DESIGN.md", *sorted((ROOT / "docs").glob("*.md")))
COLUMNS = 80
MODULES = {"README.md": "patterns/streaming_llm.spat", "DESIGN.md": "near.spat"}  # of which code is shown
_BLOCK = re.compile(r"^```\n\$ spdsl (.*)\n((?:.*\n)*?)^```$", re.MULTILINE)
_CODE = re.compile(r"^```python\n(@rt\.jit\n(?:.*\n)*?)^```$", re.MULTILINE)
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


def with_code(page: Path) -> str:
    """The text of a page with the device functions that it shows, as its module has them."""
    text = page.read_text(encoding="utf-8")
    if page.name not in MODULES:
        return text
    with beside(page):
        functions = definitions(spdsl.compile(MODULES[page.name]).text)

    def anew(found: re.Match[str]) -> str:
        names = re.findall(r"^def (\w+)", found[1], re.MULTILINE)
        return "```python\n" + "\n\n\n".join(functions[name] for name in names) + "\n```"

    return _CODE.sub(anew, text)


def definitions(text: str) -> dict[str, str]:
    """The functions of a module with their decorators, by name."""
    lines = text.splitlines()
    functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    return {
        node.name: "\n".join(lines[min([node.lineno, *(x.lineno for x in node.decorator_list)]) - 1 : node.end_lineno])
        for node in functions
    }


def rewrite(page: Path) -> None:
    def anew(found: re.Match[str]) -> str:
        return f"```\n$ spdsl {found[1]}\n{output(page, found[1])}```"

    page.write_text(_BLOCK.sub(anew, with_code(page)), encoding="utf-8")


if __name__ == "__main__":
    for each in PAGES:
        rewrite(each)
