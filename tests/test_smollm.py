"""The Llama of the examples: modules in the place of its attention, its tokenizer, its needles and its table."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

import spdsl
from examples import smollm
from examples.llama.attention import Dense, Generated, Stepwise
from examples.llama.evaluate import Entry, answer, layers_of, left_out
from examples.llama.model import Attention, Llama, Size
from examples.llama.report import BEGIN, END, read, table, written
from examples.llama.text import DEPTHS, EACH, Context, context, needles, prose
from examples.llama.tokenizer import Tokenizer
from examples.llama.weights import PACKAGE, Unavailable, load, path_of_model

ROOT = Path(__file__).resolve().parents[1]
SIZE = Size(layers=3, width=64, heads=4, kv_heads=2, rotary_base=100.0, epsilon=1e-5)
WORDS = 50


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model() -> Llama:
    torch.manual_seed(0)
    width, kv, fed = SIZE.width, SIZE.kv_heads * SIZE.dim, 96
    shapes = {"attn_q": (width, width), "attn_k": (kv, width), "attn_v": (kv, width), "attn_output": (width, width)}
    shapes |= {"ffn_gate": (fed, width), "ffn_up": (fed, width), "ffn_down": (width, fed)}
    weights = {f"blk.{i}.{name}.weight": torch.randn(s) / 8 for i in range(SIZE.layers) for name, s in shapes.items()}
    norms = [f"blk.{i}.{name}" for i in range(SIZE.layers) for name in ("attn_norm", "ffn_norm")] + ["output_norm"]
    weights |= {f"{name}.weight": torch.ones(width) for name in norms}
    return Llama(SIZE, weights | {"token_embd.weight": torch.randn(WORDS, width)})


def tokens(number: int, batch: int = 1) -> Tensor:
    return torch.randint(0, WORDS, (batch, number), generator=torch.Generator().manual_seed(1))


def generated(text: str, capacity: int, **params: float) -> list[Attention]:
    module = spdsl.load(text, **params)
    return [Generated(module, SIZE, capacity) for _ in range(SIZE.layers)]


def dense() -> list[Attention]:
    return [Dense() for _ in range(SIZE.layers)]


CAUSAL = "pattern causal { causal return attend(all) }"
NEAR = "pattern near { causal return attend(sink(2) | sliding(12)) }"


def test_causal_is_dense(model: Llama) -> None:
    """At once, in chunks, and token by token."""
    x = tokens(40)
    whole = model(x, dense(), 0, last=40)
    assert torch.allclose(model(x, generated(CAUSAL, 64), 0, last=40), whole, atol=1e-4)
    for layers in (dense(), generated(CAUSAL, 64)):
        parts = [model(x[:, a:b], layers, a, last=b - a) for a, b in [(0, 30), (30, 38), (38, 39), (39, 40)]]
        assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)


@pytest.mark.parametrize("text", [CAUSAL, NEAR])
def test_stepwise_is_token_by_token(model: Llama, text: str) -> None:
    """A layer that takes prompt and steps at once gives what all layers give step by step."""
    x = tokens(40)
    layers = generated(text, 64)
    wanted = [model(x[:, :30], layers, 0)] + [model(x[:, t : t + 1], layers, t) for t in range(30, 40)]
    found = model(x, [Stepwise(layer, 10, kept=True) for layer in generated(text, 64)], 0, last=11)
    assert torch.allclose(found, torch.cat(wanted, 1), atol=1e-5)


@pytest.mark.parametrize("text", [CAUSAL, NEAR])
def test_copies_leave_the_prompt_as_it_was(model: Llama, text: str) -> None:
    """A batch of questions after one prompt: each as if it were alone; the tail before them is not seen."""
    x, asked = tokens(40), tokens(9, batch=3)
    layers = generated(text, 64)
    model(x, [Stepwise(layer, 10, kept=True) for layer in layers], 0)
    for _ in range(2):
        found = model(asked, [Stepwise(layer, 2, 3) for layer in layers], 30, last=9)
        for row, question in enumerate(asked):
            alone = torch.cat([x[:, :30], question[None]], 1)
            wanted = model(alone, [Stepwise(layer, 2, kept=True) for layer in generated(text, 64)], 0, last=9)
            assert torch.allclose(found[row], wanted[0], atol=1e-5)


def test_first_layers_may_stay_dense(model: Llama) -> None:
    layers = layers_of(Entry("near", "streaming_llm", {"window": 8}, dense_layers=2), model, 64)
    assert [type(layer) for layer in layers] == [Dense, Dense, Generated]


def test_rotation_depends_on_distance_alone(model: Llama) -> None:
    """The same tokens later, with nothing before them, mean the same."""
    x = tokens(12)
    assert torch.allclose(model(x, dense(), 0), model(x, dense(), 100), atol=1e-4)


MERGES = ["t h", "th e", "Ġ the", "i s", "Ġ is", "Ġ t", "Ġ a", "n d"]


@pytest.fixture
def tokenizer() -> Tokenizer:
    letters = [chr(c) for c in range(33, 127)] + ["Ġ", "Ċ"]
    return Tokenizer([*letters, *(merge.replace(" ", "") for merge in MERGES)], MERGES)


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("the", ["the"]),
        ("is the", ["is", "Ġthe"]),
        ("a  the", ["a", "Ġ", "Ġthe"]),  # of two spaces the second one belongs to the word
        ("the 12", ["the", "Ġ", "1", "2"]),  # digits stand alone
        ("the's", ["the", "'", "s"]),
        ("\nthe\n", ["Ċ", "the", "Ċ"]),
        ("and", ["a", "nd"]),  # `Ġ a` is no merge of `a`
    ],
)
def test_tokens(tokenizer: Tokenizer, text: str, pieces: list[str]) -> None:
    found = tokenizer.encode(text)
    assert [tokenizer.tokens[number] for number in found] == pieces
    assert tokenizer.decode(found) == text


def test_other_letters_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="not ASCII"):
        tokenizer.encode("é")


@pytest.fixture
def whole_words() -> Tokenizer:
    """Words are tokens: the animals of the needles have one each."""
    from examples.llama import text

    letters = [chr(c) for c in range(33, 127)] + ["Ġ", "Ċ"]
    merges, made = [], []
    for animal in text._ANIMALS:
        whole = "Ġ"
        for letter in animal:
            merges.append(f"{whole} {letter}")
            whole += letter
            made.append(whole)
    return Tokenizer([*letters, *dict.fromkeys(made)], list(dict.fromkeys(merges)))


def test_needles_lie_at_their_depths(whole_words: Tokenizer) -> None:
    planted = needles(whole_words)
    assert len({one.animal for one in planted}) == len({one.number for one in planted}) == DEPTHS * EACH
    filler = whole_words.encode("." * 4000)
    found = context(whole_words, filler, 2400, 64)
    assert (len(found.prompt), len(found.tail)) == (2400 - 64, 64)
    assert len({len(question) for question in found.questions}) == 1
    text = whole_words.decode(found.prompt)
    places = [text.index(one.sentence) for one in planted]
    assert places == sorted(places)
    plain = [text[:place].count(".") for place in places[::EACH]]
    gaps = [later - before for before, later in pairwise(plain)]
    assert max(gaps) - min(gaps) <= 1
    for question, number in zip(found.questions, found.answers, strict=True):
        assert text.count(whole_words.decode(question) + whole_words.decode(number)) == 1
    with pytest.raises(ValueError, match="the needles do not make them"):
        context(whole_words, filler, 100, 64)


def test_the_text_is_long_enough() -> None:
    text = prose()
    assert text.isascii()
    assert len(text) > 8 * 8192


def test_an_answer_of_a_small_model(model: Llama) -> None:
    """The loss is that of the tail, in its order; what the pattern leaves out is told beside it."""
    x = tokens(60)[0].tolist()
    given = Context(x[:50], x[50:], (), [x[:5]] * 32, [x[:4]] * 32)
    ticks = []
    found = answer(Entry("causal", "causal"), model, given, lambda: ticks.append(1))
    whole = model(torch.tensor([x]), dense(), 0, last=60)[0]
    wanted = torch.stack([whole[t - 1, x[t]] for t in range(50, 60)])
    assert torch.allclose(found.logs, wanted, atol=1e-4)
    assert found.loss == pytest.approx(-wanted.mean().item(), abs=1e-4)
    assert (len(found.found), len(found.by_depth), len(ticks)) == (32, 8, 2 * SIZE.layers)
    assert found.vectors["layers.2.k"].shape == (1, 2, 59, 16)
    shares = left_out(Entry("near", "sliding_window", {"window": 8}), found.vectors)
    assert 0 < shares["kept"] < 1
    assert shares["sparsity"] > 0.5


def test_the_page_is_that_of_the_results() -> None:
    page = (ROOT / "docs" / "smollm.md").read_text(encoding="utf-8")
    results = read(ROOT / "benchmarks" / "results" / "smollm" / "results.json")
    assert written(page, results) == page
    assert results["difference"] <= smollm.TOLERANCE
    assert {row["name"] for row in results["rows"]} <= {entry.name for entry in smollm.ENTRIES}


def test_a_table_of_results() -> None:
    row = {"title": "near", "name": "near", "length": 1024, "tail": 64, "loss": 2.5, "needles": [4] * 4 + [0] * 4}
    rows = [row | {"name": "dense", "title": "dense", "loss": 2.25}, row]
    shares = {"sparsity": 0.5, "kept": 0.875, "missed": 0.1}
    results = {"rows": [one | shares for one in rows], "text": "T", "versions": "V", "threads": 2, "difference": 1e-5}
    assert "| near | 2.5000 | +0.2500 | 16 of 32 | 4 4 4 4 0 0 0 0 | 50.0 % | 87.5 % | 10.0 % |" in table(results)
    assert written(f"a\n{BEGIN}old{END}\nb", results).startswith(f"a\n{BEGIN}\n\n**1,024 tokens**")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def none() -> Path:
        raise Unavailable("not here")

    monkeypatch.setattr(smollm, "path_of_model", none)
    assert smollm.main(["--short"]) == 2
    assert smollm.main(["--short", "--if-there"]) == 0
    assert "not here" in capsys.readouterr().out


def test_the_model_itself() -> None:
    """Where its package is installed: it knows a capital, and `causal` is dense to 1e-3."""
    pytest.importorskip("gguf")
    try:
        model, tokenizer = load(path_of_model())
    except Unavailable:
        pytest.skip(f"{PACKAGE} is not installed")
    x = torch.tensor([tokenizer.encode("The capital of France is Paris, and the capital of Italy is")])
    module = spdsl.load(CAUSAL)
    layers: list[Attention] = [Generated(module, model.size, 64) for _ in range(model.size.layers)]
    found = model(x, layers, 0, last=x.shape[1])
    wanted = model(x, [Dense() for _ in range(model.size.layers)], 0, last=x.shape[1])
    assert (found - wanted).abs().max() < 1e-3
    assert tokenizer.tokens[int(wanted[0, -1].argmax())] == "ĠRome"
