"""Every command that a document names parses, and runs unless that needs a GPU or long; every option is in a test."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from spdsl.cli import main
from tests.docs.printed import PAGES, ROOT, beside

SOURCES = ("nsa", "near", "window")  # files that the documents take for granted
QKV = {"q": (64, 24, 192), "k": (4, 24, 192), "v": (4, 24, 128)}  # the heads and dims of nsa
DIFFERENT = {"--dry", "--quick", "--suite", "--part", "--retries"}  # of the benchmarks and of pip
TOOLS = re.compile(r"examples/|benchmarks\.run|pip install|make |-->|\+--")


def commands(page: Path) -> Iterator[str]:
    """What follows `spdsl`: lines of code, and code within a line."""
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^(?:    )?(?:\$ )?spdsl (\w.*)$|`spdsl (\w[^`]*)`", text, re.MULTILINE):
        yield (found[1] or found[2]).split(">")[0].strip()


CASES = [(page, line) for page in PAGES for line in dict.fromkeys(commands(page))]


def arguments(line: str, folder: Path) -> list[str]:
    """The words of a command, with what a shell or a reader replaces."""
    words: list[str] = []
    for word in shlex.split(line, comments=True):
        if "*" in word:
            words += map(str, sorted(Path(folder).glob(word)))
        else:
            words += {"FILE": ["near.spat"], "FILE...": ["near.spat"], "CODE": ["E102"], "NAME": ["near"]}.get(
                word, [word]
            )
    if words[0] in ("calibrate", "diagnose") and "--data" not in words:
        words += ["--data", "qkv.safetensors", *(["--sparsity", "0.5"] if words[0] == "calibrate" else [])]
    named = "-" in words or any(word.endswith((".spat", ".py")) for word in words)
    return words if named or words[0] == "explain" else [*words, "near.spat"]  # options alone, in a sentence


def prepared(folder: Path) -> None:
    (folder / "build").mkdir()
    for name in ("nsa", "streaming_llm"):
        (folder / "build" / f"{name}.py").touch()
    three = {f"layers.{i}.{x}": torch.randn(1, *size) for i in (0, 10, 20) for x, size in QKV.items()}
    save_file(three, folder / "qkv.safetensors")
    save_file({"gates": torch.ones(1, 64, 24, 3)}, folder / "trained.safetensors")
    for name in SOURCES:
        if not (folder / f"{name}.spat").exists():
            (folder / f"{name}.spat").write_text(
                f"pattern {name} {{ param window = 8 causal return attend(sliding(window)) }}\n"
            )


def test_there_are_commands() -> None:
    assert {line.split()[0] for _, line in CASES} >= set(main.commands)


@pytest.mark.parametrize("page, line", CASES, ids=[f"{page.stem}: {line[:50]}" for page, line in CASES])
def test_it_parses_and_runs(page: Path, line: str) -> None:
    with beside(page) as folder:
        prepared(folder)
        name, *rest = arguments(line, folder)
        command = main.commands[name]
        if "--help" not in rest and "tree|pattern" not in line:
            command.make_context(name, list(rest))
        if runs(name, rest):
            done = CliRunner().invoke(main, [name, *rest], input=(folder / "near.spat").read_text())
            assert done.exit_code == 0, done.output


def runs(name: str, rest: list[str]) -> bool:
    """The others are run by tests/tuning (tune), tests/cli (calibrate), tests/machine and test_printed.py (report,
    gates, binaries).
    """
    needs_pictures = any(word.endswith(".png") for word in rest)
    if needs_pictures:
        pytest.importorskip("matplotlib")
    takes_long = {"--report", "--deny", "--cubin"} & set(rest)
    return name not in ("tune", "calibrate") and not takes_long and not any("tree|pattern" in word for word in rest)


def known() -> set[str]:
    return {
        name
        for command in main.commands.values()
        for option in command.params
        if isinstance(option, click.Option)
        for name in option.opts
        if name.startswith("--")
    }


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in ("training.md", "smollm.md")], ids=lambda page: page.name
)
def test_options_that_are_named_exist(page: Path) -> None:
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if not TOOLS.search(line)]
    named = {word for line in lines for word in re.findall(r"(?<![\w-])--[a-z][a-z-]+", line)}
    assert named - known() - {"--help", "--version"} - DIFFERENT == set()


def test_every_option_is_in_a_test() -> None:
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name in sorted(known()) if f'"{name}' not in tests] == []
