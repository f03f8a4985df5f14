"""The grammar itself: no conflicts, no primitive by name."""

from __future__ import annotations

import logging
import re

import pytest
from lark import Lark, logger

from spdsl import resources
from spdsl.syntax.grammar import END, tokens


def test_lalr_has_no_conflicts(caplog: pytest.LogCaptureFixture) -> None:
    """Lark resolves a shift/reduce conflict silently, and tells of it in its debug log only."""
    logger.setLevel(logging.DEBUG)
    logger.addHandler(caplog.handler)
    try:
        Lark("start: a | a start a\na: /x/", parser="lalr", debug=True)
        assert "Shift/Reduce conflict" in caplog.text  # so the log would show one
        caplog.clear()
        Lark(resources.text("grammar", "spat.lark"), parser="lalr", lexer="basic", debug=True)
        assert "conflict" not in caplog.text
    finally:
        logger.removeHandler(caplog.handler)
        logger.setLevel(logging.CRITICAL)


def test_the_keywords_are_the_documented_ones() -> None:
    words = set(re.findall(r'"([a-z]+)"', resources.text("grammar", "spat.lark")))
    assert words == {"pattern", "heads", "dim", "param", "causal", "return", "if"}


def test_every_character_is_in_a_token_or_skipped() -> None:
    text = "pattern p {\n  x = 1e5 ** 0.5 # comment ; \n ; ' \u00e9 @ }"
    found = tokens(text)
    assert found[-1].type == END
    covered = "".join(found)
    assert covered == re.sub(r"#[^\n]*|\s", "", text)
    assert all(text[token.start_pos : token.end_pos] == token for token in found[:-1])
