"""Every word: documented, its example compiles and runs; and what it takes to add one."""

from __future__ import annotations

import re

import pytest
import torch

import spdsl
from spdsl import resources
from spdsl.ir.symbols import K, Q
from spdsl.passes import evaluate
from spdsl.primitives.planned import PLANNED
from spdsl.primitives.registry import WORDS
from spdsl.primitives.word import Kind, Parameter, Scope, SetValue, Word

SMALL = {"heads": 4, "kv_heads": 2, "qk_dim": 16, "v_dim": 16}


def agrees(text: str) -> torch.Tensor:
    """Runs a pattern against its own dense reference, further results too; -> out."""
    module = spdsl.load(text)
    torch.manual_seed(0)
    inputs = module.example_inputs(1, 40, **SMALL)
    found, wanted = module.attention(**inputs), module.reference(**inputs)
    results = found if isinstance(found, tuple) else (found,)
    torch.testing.assert_close(
        tuple(result.double() for result in results),
        tuple(result.double() for result in (wanted if isinstance(wanted, tuple) else (wanted,))),
        atol=1e-4,
        rtol=1e-4,
    )
    assert all(result.abs().sum() > 0 for result in results)
    out: torch.Tensor = results[0]
    return out


@pytest.mark.parametrize("word", WORDS.values(), ids=lambda word: word.name)
def test_example_compiles_and_runs(word: Word) -> None:
    assert re.search(rf"\b{word.name}\(", word.example)
    assert spdsl.check(word.example) == []
    assert agrees(word.example).abs().sum() > 0


@pytest.mark.parametrize("word", WORDS.values(), ids=lambda word: word.name)
def test_is_documented(word: Word) -> None:
    text = (resources.folder("templates").parent / "docs" / "language.md").read_text(encoding="utf-8")
    assert re.search(rf"`(\w+ = )?{word.name}\(", text)
    assert len(word.summary) > 10
    assert all(parameter.name.isidentifier() for parameter in word.parameters)


@pytest.mark.parametrize("word", sorted(PLANNED))
def test_planned_words_are_refused_by_name(word: str) -> None:
    found = spdsl.check(f"pattern p {{ causal return attend({word}(kv, 3)) }}")
    assert [one.code for one in found] == ["E105"]
    assert f"`{word}`" in found[0].message


def test_no_word_is_both_built_and_planned() -> None:
    assert not set(WORDS) & set(PLANNED)


def test_a_new_word_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """`mirror(n)`: keys within n of the query's mirror image around position 20."""

    def mirror(scope: Scope, n: int) -> SetValue:
        return SetValue(((None, abs(K + Q - 20) < n),))

    word = Word("mirror", Kind.SET, (Parameter("n", Kind.SIZE, least=1),), mirror, "keys around the mirror image", "")
    monkeypatch.setitem(WORDS, "mirror", word)
    monkeypatch.setattr(evaluate, "WORDS", WORDS)
    q, k = torch.arange(40)[:, None], torch.arange(40)
    mask = ((k + q - 20).abs() < 3) | (q == k)
    module = spdsl.load("pattern p { return attend(mirror(3) | sliding(1)) }")
    x = module.example_inputs(1, 40, **SMALL)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        x["q"], *(x[name].repeat_interleave(2, 1) for name in "kv"), attn_mask=mask
    )
    torch.testing.assert_close(module.attention(**x), wanted, atol=1e-4, rtol=1e-4)
