"""At which length a picture is drawn, and what is said where it shows nothing."""

from __future__ import annotations

import pytest
from click.testing import CliRunner, Result

from spdsl.cli import main
from spdsl.picture import LONGEST
from spdsl.resources import folder

EXPECTS = "pattern p {{ expect(length = {}) causal return attend(sliding(8)) }}"


def show(text: str, *rest: str) -> Result:
    return CliRunner().invoke(main, ["show", "-", *rest], input=text)


def published(name: str) -> str:
    return (folder("patterns") / f"{name}.spat").read_text()


def drawn(result: Result) -> int:
    """The length of the one picture."""
    assert result.exit_code == 0, result.output
    before, _ = " ".join(result.stdout.split()).split(" queries and keys")
    return int(before.split()[-1])


@pytest.mark.parametrize(
    "text, length",
    [
        (EXPECTS.format(100), 100),
        (EXPECTS.format(LONGEST), LONGEST),
        (EXPECTS.format(8 * LONGEST), 256),
        ("pattern p { causal return attend(sliding(300)) }", 1024),  # 512: 17 % are hidden, 1024: half of them
        ("pattern p { causal return attend(sliding(6000)) }", LONGEST),
        ("pattern p { causal return attend(all) }", 256),
        ("pattern p { return attend(strided(2)) }", 256),
    ],
)
def test_the_usual_length(text: str, length: int) -> None:
    assert drawn(show(text)) == length


def test_a_length_that_is_given_wins() -> None:
    assert drawn(show(EXPECTS.format(100), "--length", "0.5k")) == 512


def test_each_pattern_of_a_file_has_its_own_length() -> None:
    text = EXPECTS.format(100) + EXPECTS.format(200).replace("pattern p", "pattern o")
    result = show(text)
    assert "100 queries and keys" in result.stdout
    assert "200 queries and keys" in result.stdout


def test_streaming_llm_shows_its_window_by_itself() -> None:
    result = show(published("streaming_llm"))
    assert drawn(result) == 4096
    assert "is hidden at" not in result.stdout


def test_a_full_triangle_is_told_with_what_would_show_more() -> None:
    result = show(published("streaming_llm"), "--length", "512")
    advice = result.stdout.splitlines()[-1]
    assert advice == "nothing but later keys is hidden at 512 tokens: try --length 4096 or -D window=64"
    for option in (["--length", "4096"], ["--length", "512", "-D", "window=64"]):
        other = show(published("streaming_llm"), *option).stdout
        assert "is hidden at" not in other
        assert float(other.split("sparsity ")[1].partition("%")[0]) >= 50


@pytest.mark.parametrize(
    "text, length, words",
    [
        (
            published("causal"),
            "64",
            f"nothing but later keys is hidden at 64 tokens, nor at any length up to {LONGEST}",
        ),
        (
            "pattern p { return attend(all) }",
            "64",
            f"nothing is hidden at 64 tokens, nor at any length up to {LONGEST}",
        ),
        ("pattern p { causal return attend(sliding(64)) }", "64", "hidden at 64 tokens: try --length 256"),
        ("pattern p { causal return attend(sliding(10000)) }", "8k", "hidden at 8192 tokens, nor at any length"),
    ],
)
def test_advice(text: str, length: str, words: str) -> None:
    assert words in show(text, "--length", length).stdout.splitlines()[-1]


def test_advice_beside_a_file(tmp_path: pytest.TempPathFactory) -> None:
    pytest.importorskip("matplotlib")
    result = show(published("streaming_llm"), "--length", "64", "-o", f"{tmp_path}/mask.png")
    assert result.stdout == f"{tmp_path}/mask.png\n"
    assert "try --length 4096 or -D window=8" in result.stderr


def test_a_picture_too_large_names_the_option() -> None:
    result = show(published("causal"), "--length", "9k")
    assert result.exit_code == 2
    assert f"--length: a picture is drawn for 1 to {LONGEST} keys, not 9216" in result.stderr
