"""Numbers and lengths on the command line: one way to read them, in every command, with the option named."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from spdsl.cli import main
from spdsl.cli.numbers import lengths, number, tokens

PATTERN = "pattern near { param window = 4 causal return attend(sliding(window)) }"
K = 1024


@pytest.fixture
def near(tmp_path: Path) -> str:
    path = tmp_path / "near.spat"
    path.write_text(PATTERN)
    return str(path)


def spdsl(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.mark.parametrize(
    "text, value",
    [
        ("4096", 4096), ("0.5", Fraction(1, 2)), ("3k", 3 * K), ("3K", 3 * K), ("1M", K * K), ("1m", K * K),
        ("0.5k", 512), ("-2k", -2 * K), (" 7 ", 7), ("-0.25", Fraction(-1, 4)),
    ],
)  # fmt: skip
def test_a_number(text: str, value: Fraction) -> None:
    assert number(text) == value


@pytest.mark.parametrize(
    "text", ["", "k", "1kk", "1 k", "1e3", "0x10", "1_000", "1g", "--1", "1.", ".5", "\u0663", "1k.."]
)
def test_what_is_no_number(text: str) -> None:
    with pytest.raises(ValueError, match="is no number: one is written in digits"):
        number(text)
    with pytest.raises(ValueError, match=r"is no number of tokens below 2\*\*31|several lengths"):
        tokens(text)


@pytest.mark.parametrize("text", ["2048M", "2097152k", "2147483648", "-2048M"])
def test_a_number_is_bounded_behind_its_suffix(text: str) -> None:
    with pytest.raises(ValueError, match="2147483647"):
        number(text)


@pytest.mark.parametrize("text", ["0", "-1", "-4k", "0.4k", "1.5", "0.3"])
def test_a_length_is_whole_and_positive(text: str) -> None:
    with pytest.raises(ValueError, match="is no number of tokens below 2"):
        tokens(text)


@pytest.mark.parametrize(
    "text, found",
    [
        ("4k", (4 * K,)), ("8k,16k", (8 * K, 16 * K)), ("16k, 8k,8192", (8 * K, 16 * K)), ("100..100", (100,)),
        ("1k..8k", (K, 2 * K, 4 * K, 8 * K)), ("1k..6k", (K, 2 * K, 4 * K, 6 * K)),
        ("512,1k..2k,1M", (512, K, 2 * K, K * K)),
    ],
)  # fmt: skip
def test_lengths(text: str, found: tuple[int, ...]) -> None:
    assert lengths(text) == found


@pytest.mark.parametrize("text", ["", ",", "8k,", "8k..4k", "..", "4k..", "..4k", "1..2..3", "4k-8k", "8k;16k"])
def test_what_are_no_lengths(text: str) -> None:
    with pytest.raises(ValueError, match=r"no number of tokens|ends before it begins|several lengths"):
        lengths(text)


def test_too_many_lengths() -> None:
    with pytest.raises(ValueError, match="stands for 100 lengths, and at most 64"):
        lengths(",".join(map(str, range(1, 101))))


COMMANDS = ("check", "compile", "show", "cost")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("text", ["abc", "-5", "0", "1.3k", "4096M", "8k..4k", "8k,,4k"])
def test_a_wrong_length_names_the_option(command: str, text: str, near: str) -> None:
    result = spdsl(command, near, "--length", text)
    assert result.exit_code == 2
    assert "Invalid value for '--length': `" in result.stderr


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("text", ["window=abc", "window=", "window", "=3k", "window=4096M", "window=1kk"])
def test_a_wrong_parameter_names_the_option(command: str, text: str, near: str) -> None:
    result = spdsl(command, near, "-D", text)
    assert result.exit_code == 2
    assert "Invalid value for '-D' / '--define': " in result.stderr


@pytest.mark.parametrize("command", ["check", "compile", "cost"])
def test_an_unknown_gpu_names_the_option_and_lists_all(command: str, near: str) -> None:
    for text in ("h10", "zzz", ""):
        result = spdsl(command, near, "--length", "1k", "--target", text)
        assert result.exit_code == 2
        assert "Invalid value for '--target': unknown target" in result.stderr
        assert "known are a100, b200, h100, h200, l40s, mi300x, rtx4090" in result.stderr
    assert "did you mean h100" in spdsl(command, near, "--target", "h10").stderr


@pytest.mark.parametrize("command", ["compile", "show"])
def test_one_length_is_expected(command: str, near: str) -> None:
    for text in ("8k,16k", "1k..4k"):
        assert "stands for several lengths, and one is expected" in spdsl(command, near, "--length", text).stderr


def test_costs_at_a_list_of_lengths(near: str) -> None:
    result = spdsl("cost", near, "--length", "8k,16k,1k", "-D", "window=3k", "--phase", "decode", "--format", "json")
    (document,) = json.loads(result.stdout)
    assert [point["length"] for point in document["curves"][0]["points"]] == [K, 8 * K, 16 * K]
    assert "--length': 8388608 tokens: costs are told up to 4M" in spdsl("cost", near, "--length", "8M").stderr


def test_a_check_at_each_length(tmp_path: Path) -> None:
    path = tmp_path / "p.spat"
    path.write_text("pattern p { causal chosen = top_k(8, score = softmax(dot(compress(64)))) return attend(chosen) }")
    told = [
        spdsl("check", str(path), "--target", "h200", "--length", text).stderr for text in ("256", "64k", "256,64k")
    ]
    short, long = (text.count("W513") for text in told[:2])
    assert (short, long) == (1, 0)
    assert told[2].count("W513") == 1


def test_a_picture_of_1k_and_a_window_of_3k(near: str) -> None:
    result = spdsl("show", near, "--length", "1k", "-D", "window=0.5k")
    assert result.exit_code == 0
    assert "window = 512  1024 queries and keys" in result.stdout
    assert "PARAMS = {'window': 3072}" in spdsl("compile", near, "-D", "window=3k", "--emit", "module").stdout.replace(
        '"', "'"
    )
