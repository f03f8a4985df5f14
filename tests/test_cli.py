"""The command line, with a stand-in for the compiler behind it: arguments, exit codes, files, output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner, Result

from spdsl.catalogue import entries
from spdsl.cli import main
from spdsl.cli.output import HEADER, Foreign, write_module
from spdsl.diagnostics import Diagnostic, Report, Severity, Source, Span, SpatError
from spdsl.syntax.parse import parse
from spdsl.targets import Target

GOOD = "pattern one { param n = 1 return all }\npattern two { return all }\n"
WARNING = Diagnostic("W107", "binding is never used", Span(0, 7), severity=Severity.WARNING)


@dataclass
class Module:
    name: str
    text: str
    diagnostics: tuple[Diagnostic, ...] = ()


@pytest.fixture(autouse=True)
def compiler(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Compiles to a comment; a parameter `wrong` is an error, `odd` a warning."""
    stand_in = ModuleType("spdsl.compiler")

    def findings(
        source: Source, params: dict[str, Fraction], judged: object = None, only: str | None = None
    ) -> list[Diagnostic]:
        report = Report(source)
        parse(source, report)
        if "wrong" in params:
            report.error("E501", "there is no parameter `wrong`", None)
        if "odd" in params:
            report.add(WARNING)
        return report.diagnostics

    def compile_pattern(source: Source, pattern: str | None, params: dict[str, Fraction], judged: object) -> Module:
        found = findings(source, params)
        if any(one.severity is Severity.ERROR for one in found) and pattern == "two":
            raise SpatError(source, found)
        return Module(str(pattern), f"{HEADER}\n# {pattern} {params}\n", tuple(found))

    stand_in.check = findings  # type: ignore[attr-defined]
    stand_in.compile = compile_pattern  # type: ignore[attr-defined]
    stand_in.emit = lambda source, pattern, params, stage: f"{pattern} {stage} {params}"  # type: ignore[attr-defined]
    stand_in.plan_of = lambda source, pattern, params: pattern  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "spdsl.compiler", stand_in)
    return stand_in


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose kernels were compiled; their report and counts are a line each."""
    paths: list[Path] = []

    def compile_file(path: Path, gpus: list[Target]) -> list[str]:
        paths.append(path)
        return [f"{path.name} for {gpu.name}" for gpu in gpus]

    stand_ins: dict[str, dict[str, object]] = {
        "module_report": {"compile_file": compile_file, "write_binaries": None, "name_of": None},
        "report": {"report": lambda rows: f"report {rows}", "to_json_of_files": json.dumps},
        "counts": {"tables": lambda plan: [f"counts of {plan}"], "gathered": lambda plan: []},
    }
    for name, members in stand_ins.items():
        module = ModuleType(f"spdsl.machine.{name}")
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return paths


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.spat").write_text(GOOD)
    (tmp_path / "bad.spat").write_text("pattern p {\n x = a or b\n}\n")
    return tmp_path


def spdsl(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def test_every_pattern_of_the_file_is_compiled(folder: Path) -> None:
    result = spdsl("compile", "good.spat", "-o", "build/deep")
    assert (result.exit_code, result.stdout) == (0, "build/deep/one.py\nbuild/deep/two.py\n")
    assert (folder / "build/deep/two.py").read_text() == f"{HEADER}\n# two {{}}\n"
    assert sorted(path.name for path in (folder / "build/deep").iterdir()) == ["one.py", "two.py"]


def test_one_pattern_with_a_parameter(folder: Path) -> None:
    result = spdsl("compile", "good.spat", "-p", "one", "-D", "n=0.5", "-D", "m=-3")
    assert (result.exit_code, result.stdout) == (0, "one.py\n")
    assert "{'n': Fraction(1, 2), 'm': Fraction(-3, 1)}" in (folder / "one.py").read_text()


def test_an_error_in_the_last_pattern_leaves_no_file(folder: Path) -> None:
    result = spdsl("compile", "good.spat", "-o", "build", "-D", "wrong=1")
    assert result.exit_code == 1
    assert "error[E501]: there is no parameter `wrong`" in result.stderr
    assert result.stderr.endswith("1 error\n")
    assert not (folder / "build").exists()


def test_warnings_do_not_stop_compiling(folder: Path) -> None:
    result = spdsl("compile", "good.spat", "-p", "one", "-D", "odd=1")
    assert result.exit_code == 0
    assert "warning[W107]: binding is never used" in result.stderr


def test_a_syntax_error_is_drawn(folder: Path) -> None:
    result = spdsl("compile", "bad.spat")
    assert result.exit_code == 1
    assert result.stderr.startswith("error[E004]: `or` is written `|`\n --> bad.spat:2:8\n")


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    "arguments, words",
    [
        (["compile", "missing.spat"], "does not exist"),
        (["compile", "."], "is a directory"),
        (["compile", "good.spat", "-p", "three"], "it holds one, two"),
        (["compile", "good.spat", "-D", "n"], "not of the form name=value"),
        (["compile", "good.spat", "-D", "n=1e999999999"], "written in digits"),
        (["compile", "good.spat", "-D", "n=99999999999"], "at most 2147483647"),
        (["compile", "good.spat", "-D", "n=1", "-D", "n=2"], "defined twice"),
        (["compile", "good.spat", "--emit", "soup"], "is not one of"),
        (["compile", "good.spat", "--target", "h200"], "give both"),
        (["check"], "Missing argument"),
        (["explain", "E999"], "the codes are E001"),
        (["show", "good.spat", "--length", "0"], "not in the range"),
        (["bake"], "No such command"),
    ],
)
def test_usage_errors(arguments: list[str], words: str) -> None:
    result = spdsl(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr


def test_stages_are_printed(folder: Path) -> None:
    result = spdsl("compile", "good.spat", "--emit", "plan")
    assert (result.exit_code, result.stdout) == (0, "one plan {}\ntwo plan {}\n")
    assert not list(folder.glob("*.py"))


@pytest.mark.usefixtures("folder")
def test_report(compiled: list[Path]) -> None:
    result = spdsl("compile", "good.spat", "-p", "one", "--report", "--target", "h200")
    assert (result.exit_code, result.stdout) == (0, "one.py\nreport ['one.py for h200']\ncounts of one\n")
    assert len(compiled) == 1, "what the tables show is compiled once"


@pytest.mark.usefixtures("folder")
def test_report_as_json_of_the_usual_gpu(compiled: list[Path]) -> None:
    result = spdsl("compile", "good.spat", "--report", "--format", "json")
    assert json.loads(result.stdout) == {"one.py": ["one.py for h100"], "two.py": ["two.py for h100"]}
    assert (result.exit_code, result.stderr, len(compiled)) == (0, "one.py\ntwo.py\n", 2)


@pytest.mark.usefixtures("folder")
def test_check_as_text() -> None:
    clean = spdsl("check", "good.spat")
    assert (clean.exit_code, clean.stdout, clean.stderr) == (0, "", "no errors, no warnings\n")
    both = spdsl("check", "good.spat", "bad.spat")
    assert both.exit_code == 1
    assert both.stderr.endswith("1 error\n")
    assert spdsl("check", "good.spat", "-D", "odd=1").exit_code == 1


def test_check_as_json(folder: Path) -> None:
    (folder / "binary.spat").write_bytes(b"\xff\xfe")
    result = spdsl("check", "good.spat", "bad.spat", "binary.spat", "--format", "json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert [(one["filename"], one["code"]) for one in found] == [("bad.spat", "E004"), ("binary.spat", "E002")]
    clean = spdsl("check", "good.spat", "--format", "json")
    assert (clean.exit_code, json.loads(clean.stdout)) == (0, [])


@pytest.mark.parametrize("code", entries())
def test_explain(code: str) -> None:
    result = spdsl("explain", code.lower())
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{code}: {entries()[code].title}")
    assert "Wrong" in result.stdout
    assert "Right" in result.stdout
    assert result.stdout.replace("\n", "").isprintable()


def test_show_is_passed_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = ModuleType("spdsl.picture")
    seen: list[tuple[object, ...]] = []
    picture.show = lambda source, *rest: seen.append((source.text, *rest))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "spdsl.picture", picture)
    result = spdsl("show", "good.spat", "-p", "one", "--length", "64", "-o", "mask.png", "-D", "n=2")
    assert result.exit_code == 0
    assert seen == [(GOOD, "one", {"n": Fraction(2)}, 64, "mask.png")]


def test_version() -> None:
    result = spdsl("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("spdsl ")


def test_the_command_starts_without_the_heavy_libraries() -> None:
    script = "import sys, spdsl.cli; print(*sorted({'torch', 'triton', 'sympy', 'jinja2', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_foreign_file_is_kept(folder: Path) -> None:
    (folder / "one.py").write_text("import mine\n")
    result = spdsl("compile", "good.spat", "-p", "one")
    assert result.exit_code == 2
    assert "one.py was not made by spdsl; --force overwrites it" in result.stderr
    assert (folder / "one.py").read_text() == "import mine\n"
    assert spdsl("compile", "good.spat", "-p", "one", "--force").exit_code == 0
    assert (folder / "one.py").read_text().startswith(HEADER)
    assert spdsl("compile", "good.spat", "-p", "one").exit_code == 0


@pytest.mark.usefixtures("folder")
def test_the_output_must_be_a_folder() -> None:
    assert spdsl("compile", "good.spat", "-o", "bad.spat").exit_code == 2
    assert spdsl("compile", "good.spat", "-o", "bad.spat/deeper").exit_code == 2


def test_a_link_is_not_followed(folder: Path) -> None:
    target = folder / "elsewhere.txt"
    target.write_text(f"{HEADER}\n")
    (folder / "one.py").symlink_to(target)
    with pytest.raises(Foreign):
        write_module(folder, "one", "text")
    write_module(folder, "one", "text", force=True)
    assert target.read_text() == f"{HEADER}\n"
    assert not (folder / "one.py").is_symlink()


@pytest.mark.parametrize("name", ["../one", "a/b", "", ".", "a.b", "one\n"])
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a module"):
        write_module(tmp_path, name, "text")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_module(tmp_path, "one", f"{HEADER} old")

    def fail(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_module(tmp_path, "one", f"{HEADER} new")
    assert [path.read_text() for path in tmp_path.iterdir()] == [f"{HEADER} old"]


def test_names_that_differ_in_case_only(folder: Path) -> None:
    (folder / "case.spat").write_text("pattern one { return all } pattern One { return all }")
    result = spdsl("compile", "case.spat")
    assert result.exit_code == 2
    assert "differ in case only" in result.stderr
