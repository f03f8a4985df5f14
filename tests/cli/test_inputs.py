"""Which files, patterns and parameters a command works on, with the real compiler behind it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import spdsl as package
from spdsl.cli import main
from spdsl.limits import SOURCE_BYTES

NEAR = "pattern near { param window = 4 causal return attend(sliding(window)) }\n"
WHOLE = "pattern whole { param sinks = 2 causal return attend(all) }\n"
FAR = "pattern far { param window = 8 causal return attend(sliding(window)) }\n"
WRONG = "pattern wrong { return attend(al) }\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.spat").write_text(NEAR + WHOLE.replace("param sinks = 2 ", ""))
    (tmp_path / "far.spat").write_text(FAR)
    (tmp_path / "wrong.spat").write_text(WRONG)
    return tmp_path


def spdsl(*arguments: str, given: str | bytes | None = None) -> Result:
    return CliRunner().invoke(main, arguments, input=given)


# ---- -D


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("command", ["check", "compile", "show", "cost"])
def test_an_override_goes_to_the_patterns_that_have_it(command: str) -> None:
    rest = {"compile": ["--emit", "pattern"], "show": ["--length", "64"], "cost": ["--length", "1k"]}.get(command, [])
    assert spdsl(command, "two.spat", "-D", "window=3", *rest).exit_code == 0
    assert spdsl(command, "two.spat", "-D", "window=3", "-p", "near", *rest).exit_code == 0
    nobody = spdsl(command, "two.spat", "-D", "widow=3", *rest)
    assert nobody.exit_code == 1
    assert "error[E501]: pattern `near` has no parameter `widow`" in nobody.stderr
    assert "did you mean `window`?" in nobody.stderr
    other = spdsl(command, "two.spat", "-D", "window=3", "-p", "whole", *rest)
    assert other.exit_code == 1
    assert "pattern `whole` has no parameter `window`" in other.stderr


def test_overrides_over_several_files(folder: Path) -> None:
    assert spdsl("check", "two.spat", "far.spat", "-D", "window=3").exit_code == 0
    (folder / "sinks.spat").write_text(WHOLE)
    result = spdsl(
        "compile", "far.spat", "sinks.spat", "two.spat", "-p", "far", "-p", "far", "-D", "window=3k", "-o", "a"
    )
    assert (result.exit_code, result.stdout) == (0, "a/far.py\n"), result.output
    both = spdsl("compile", "far.spat", "sinks.spat", "-D", "window=3k", "-D", "sinks=5", "-o", "b")
    assert (both.exit_code, both.stdout) == (0, "b/far.py\nb/whole.py\n"), both.output
    assert "3072" in (folder / "b/far.py").read_text()
    assert spdsl("check", "far.spat", "two.spat", "-D", "sinks=5").exit_code == 1


def test_the_python_interface_shares_parameters_as_well(folder: Path) -> None:
    assert package.check(folder / "two.spat", window=3) == []
    assert [one.code for one in package.check(folder / "two.spat", widow=3)] == ["E501", "E501"]


# ---- -p


@pytest.mark.usefixtures("folder")
def test_check_of_one_pattern() -> None:
    Path("mixed.spat").write_text(NEAR + WRONG)
    assert spdsl("check", "mixed.spat").exit_code == 1
    assert spdsl("check", "mixed.spat", "-p", "near").exit_code == 0
    assert spdsl("check", "mixed.spat", "-p", "wrong").exit_code == 1
    assert spdsl("check", "far.spat", "mixed.spat", "-p", "near").exit_code == 0, "the first file has none of it"
    unknown = spdsl("check", "mixed.spat", "far.spat", "-p", "nera")
    assert unknown.exit_code == 2
    assert "mixed.spat, far.spat hold no pattern `nera`; they hold near, wrong, far" in unknown.stderr
    Path("broken.spat").write_text("pattern near {")
    assert spdsl("check", "broken.spat", "-p", "near").exit_code == 1, "what does not parse is told"


@pytest.mark.usefixtures("folder")
def test_fixing_one_pattern_leaves_the_other() -> None:
    text = "pattern one { return attend(open(7.0)) }\npattern two { return attend(al) }\n"
    Path("both.spat").write_text(text)
    before = spdsl("check", "both.spat", "-p", "one").stderr
    spdsl("check", "both.spat", "-p", "one", "--fix")
    assert "pattern two { return attend(al) }" in Path("both.spat").read_text(), before


# ---- long forms, and sizes of a call


def test_long_forms(folder: Path) -> None:
    result = spdsl("compile", "far.spat", "--define", "window=3k", "--pattern", "far", "--output", "made")
    assert (result.exit_code, result.stdout) == (0, "made/far.py\n")
    assert "3072" in (folder / "made/far.py").read_text()


def test_sizes_of_a_costed_call() -> None:
    """Twice the sequences, twice the work; fewer pairs and choices that are more alike, less of it."""
    text = "pattern p { mark = tensor(token, bool) causal return attend(where(mark[k])) }"
    picks = "pattern p { causal chosen = top_k(4, score = softmax(dot(compress(64)))) return attend(chosen) }"

    def run(given: str, *rest: str) -> int:
        arguments = ("cost", "-", "--length", "4k", "--phase", "forward", "--format", "json", *rest)
        (document,) = json.loads(spdsl(*arguments, given=given).stdout)
        return int(document["curves"][0]["points"][0]["machine"])

    assert run(text, "--batch", "2") == 2 * run(text)
    assert run(text, "--density", "0.5") < run(text)
    assert run(picks, "--overlap", "1") < run(picks)


# ---- files


def test_compile_takes_many_files(folder: Path) -> None:
    result = spdsl("compile", "far.spat", "far.spat", "two.spat", "-o", "made")
    assert (result.exit_code, result.stdout) == (0, "made/far.py\nmade/near.py\nmade/whole.py\n")
    (folder / "again.spat").write_text(FAR)
    again = spdsl("compile", "far.spat", "again.spat", "-o", "again")
    assert again.exit_code == 2
    assert "two of the files hold a pattern `far`" in again.stderr
    assert not (folder / "again").exists()
    assert spdsl("compile", "far.spat", "wrong.spat", "-o", "again").exit_code == 1
    assert not (folder / "again").exists(), "an error in the last file leaves nothing behind"
    (folder / "file").write_text("")
    assert spdsl("compile", "far.spat", "wrong.spat", "-o", "file").exit_code == 2


# ---- standard input


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    "arguments",
    [
        ["check"],
        ["compile", "--emit", "tree"],
        ["show", "--length", "64"],
        ["cost", "--length", "1k", "--phase", "decode"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_standard_input(arguments: list[str]) -> None:
    command, *rest = arguments
    assert spdsl(command, "-", *rest, given=NEAR).exit_code == 0
    result = spdsl(command, "-", *rest, given="pattern p {\n return attend(al)\n}")
    if command != "compile":  # the tree is made before names are looked up
        assert result.exit_code == 1
        assert " --> <stdin>:2:16" in result.stderr
    for given in (b"\xff\xfe", b"#" * (SOURCE_BYTES + 1), b""):
        result = spdsl(command, "-", *rest, given=given)
        assert result.exit_code == 1
        assert "error[E00" in result.stderr
        assert " --> <stdin>" in result.stderr


@pytest.mark.usefixtures("folder")
def test_standard_input_among_files() -> None:
    result = spdsl("compile", "far.spat", "-", "-o", "made", given=NEAR)
    assert result.stdout == "made/far.py\nmade/near.py\n"
    assert " from _stdin_, pattern near" in Path("made/near.py").read_text()
    found = json.loads(spdsl("check", "wrong.spat", "-", "--format", "json", given=WRONG).stdout)
    assert [one["filename"] for one in found] == ["wrong.spat", "<stdin>"]
    assert spdsl("check", "-", "-", given=WRONG).stderr.count("error[E101]") == 1
    assert "standard input is none" in spdsl("check", "-", "--fix", given=NEAR).stderr


def test_standard_input_is_read_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    from spdsl.cli import inputs

    endless = io.BytesIO(b"#" * (4 * SOURCE_BYTES))
    monkeypatch.setattr(inputs.click, "open_file", lambda *rest: endless)
    with pytest.raises(package.SpatError, match="more than 128 KiB"):
        inputs.read_source("-")
    assert endless.tell() == SOURCE_BYTES + 1


# ---- the shipped patterns


def test_the_shipped_patterns_are_quiet_at_64k_on_an_h200() -> None:
    from spdsl.resources import folder

    files = sorted(map(str, folder("patterns").glob("*.spat")))
    result = spdsl("check", *files, "--target", "h200", "--length", "64k")
    assert (result.exit_code, result.stderr) == (0, "no errors, no warnings\n")


def test_what_moba_says_of_its_numbers() -> None:
    """12 blocks of 4096 are slower than dense at 64k, 3 of 512 are faster; both as its comment tells."""
    from spdsl.resources import folder

    text = (folder("patterns") / "moba.spat").read_text().replace("allow(W510)", "")

    def codes(*rest: str) -> list[str]:
        found = spdsl("check", "-", "--target", "h200", "--format", "json", *rest, given=text)
        return [one["code"] for one in json.loads(found.stdout)]

    assert codes("--length", "64k") == ["W510"]
    assert codes("--length", "256k") == ["W510"]
    assert codes("--length", "512k,1M") == []
    assert codes("--length", "64k", "-D", "block=512", "-D", "count=3") == []
