"""What `spdsl` tells about itself: defaults, names, examples, the nearest word."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from spdsl.catalogue import entries
from spdsl.cli import main
from spdsl.passes.count import Shape
from spdsl.targets import USUAL, names

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(main.commands)


def spdsl(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def words(*arguments: str) -> str:
    return " ".join(spdsl(*arguments).stdout.split())


def test_alone_it_says_what_to_do() -> None:
    result = spdsl()
    assert result.exit_code == 0
    assert result.stdout == spdsl("--help").stdout
    assert [name for name in COMMANDS if f"\n  {name} " not in result.stdout] == []
    assert "..." not in result.stdout.partition("\n")[2], "no line is cut"
    assert ", ".join(names()) in result.stdout
    steps = [shlex.split(line, comments=True) for line in result.stdout.splitlines() if line.startswith("    spdsl ")]
    assert {step[1] for step in steps} == {"show", "check", "cost", "compile"}
    for _, name, *rest in steps:
        assert all((ROOT / file).exists() for file in rest)
        main.commands[name].make_context(name, [str(ROOT / file) for file in rest])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_that_parses(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = spdsl(name, "--help").stdout
    assert max(map(len, text.splitlines())) <= 90
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "nsa.py").touch()
    (tmp_path / "patterns").symlink_to(ROOT / "patterns")
    monkeypatch.chdir(tmp_path)
    examples = re.findall(rf"Example: spdsl {name} (.*)", text)
    assert len(examples) == 1
    arguments = shlex.split(examples[0].replace("patterns/*.spat", "patterns/nsa.spat patterns/causal.spat"))
    main.commands[name].make_context(name, arguments)
    if name != "explain":
        assert "Exit codes: 0 " in text


def test_defaults_are_told() -> None:
    """Those of the sizes that patterns leave open are written in the help, so that --help does not wait for sympy."""
    usual = Shape()
    for option, size in (("heads", usual.heads), ("kv-heads", usual.kv_heads), ("dim", usual.qk)):
        assert re.search(rf"--{option} N [^\[]*\[default: {size}\]", words("cost", "--help")), option
    assert usual.qk == usual.v


def test_defaults_of_tune_are_those_of_modules() -> None:
    from spdsl.compiler import emit
    from spdsl.diagnostics import Source

    text = emit(Source("pattern p { causal return attend(all) }"), "p", {}, "module")
    line = text[text.index("def example_inputs(") :].partition(") ->")[0]
    told = words("tune", "--help")
    for option, name in (("heads", "heads"), ("kv-heads", "kv_heads"), ("dim", "qk_dim"), ("dim", "v_dim")):
        found = re.search(rf"\b{name}: int = (\d+)", line)
        assert found is not None
        assert re.search(rf"--{option} N [^\[]*\[default: {found[1]}\]", told), option


@pytest.mark.parametrize("name", ["check", "compile", "cost", "tune"])
def test_gpus_are_told(name: str) -> None:
    told = words(name, "--help")
    assert ", ".join(names()) in told
    if name in ("compile", "cost"):
        assert f"[default: {USUAL}]" in told


@pytest.mark.parametrize("name", COMMANDS)
def test_every_default_is_told(name: str) -> None:
    """An option with a value says what it is without one, or that it is for what is left out."""
    for option in main.commands[name].params:
        if isinstance(option, click.Option) and option.default not in (None, False, ()) and not option.is_flag:
            if "UNSET" in repr(option.default) or option.name == "help":
                continue
            assert option.show_default, option.name


def test_explain_lists_all_codes() -> None:
    lines = spdsl("explain").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(entries())
    assert all(entries()[line.split()[0]].title in line for line in lines)
    assert max(map(len, lines)) <= 80
    assert "did you mean `E102`?" in spdsl("explain", "E1022").stderr


@pytest.mark.parametrize(
    "arguments, near",
    [
        (["chek"], "Did you mean `check`?"),
        (["complie", "x.spat"], "Did you mean `compile`?"),
        (["cost", "patterns/nsa.spat", "--lenght", "4k"], "--length"),
        (["check", "patterns/nsa.spat", "--taget", "h200"], "--target"),
    ],
)
def test_near_words_are_told(arguments: list[str], near: str) -> None:
    result = spdsl(*arguments)
    assert result.exit_code == 2
    assert near in result.stderr


def test_version_is_told_by_a_long_option() -> None:
    assert re.fullmatch(r"spdsl (\d+\.\d+\.\d+|\(not installed.*\))\n", spdsl("--version").stdout)


def test_no_option_is_without_a_word() -> None:
    for name in COMMANDS:
        for option in main.commands[name].params:
            if isinstance(option, click.Option):
                assert option.help or option.show_default, (name, option.name)
    assert inspect.getdoc(main.callback)
