"""A context of docstrings of Python's own library, with needles in it, and the questions for them."""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from examples.llama.tokenizer import Tokenizer

DEPTHS, EACH = 8, 4  # needles: so many at each depth
DIGITS = 4
_LEAST = 300  # characters of a docstring: shorter ones are no text
_ANIMALS = (
    "cat dog horse cow pig sheep goat rabbit mouse rat lion tiger bear wolf fox deer elephant monkey camel whale shark "
    "dolphin seal otter eagle hawk owl crow duck goose swan chicken turkey snake frog turtle spider ant bee butterfly "
    "beetle worm crab lobster salmon trout donkey zebra giraffe panda kangaroo bat squirrel pigeon penguin"
).split()


@dataclass(frozen=True)
class Needle:
    animal: str
    number: str
    depth: int

    @property
    def sentence(self) -> str:
        return f"{self.question}{self.number}.\n"

    @property
    def question(self) -> str:
        return f"\nThe secret number of the {self.animal} is "


@dataclass(frozen=True)
class Context:
    """`prompt` holds the needles, `tail` is what follows; numbers of tokens."""

    prompt: list[int]
    tail: list[int]
    needles: tuple[Needle, ...]
    questions: list[list[int]]
    """One for each needle, all of one length."""
    answers: list[list[int]]


def prose() -> str:
    """Docstrings of the modules in Python's library, by name: ASCII, and of some length."""
    folder = Path(sysconfig.get_path("stdlib"))
    found = [text for path in sorted(folder.glob("*.py")) for text in _docstrings(path)]
    return "\n\n".join(found) + "\n"


def _docstrings(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node) or ""
            if len(text) >= _LEAST and text.isascii():
                yield text


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def needles(tokenizer: Tokenizer) -> tuple[Needle, ...]:
    """Animals of one token each, so that all questions are equally long; numbers by multiplication, all different."""
    animals = [animal for animal in _ANIMALS if len(tokenizer.encode(f" {animal}")) == 1]
    if len(animals) < DEPTHS * EACH:
        raise ValueError(f"{len(animals)} animals are one token, {DEPTHS * EACH} needles need one each")
    numbers = [str(1000 + 7919 * (i + 1) % 9000) for i in range(DEPTHS * EACH)]
    return tuple(Needle(animals[i], number, i // EACH) for i, number in enumerate(numbers))


def context(tokenizer: Tokenizer, text: list[int], length: int, tail: int) -> Context:
    """`length` tokens: the text with needles at equal distances, and its next `tail` tokens. Raises ValueError."""
    planted = needles(tokenizer)
    groups = [
        [token for one in planted if one.depth == depth for token in tokenizer.encode(one.sentence)]
        for depth in range(DEPTHS)
    ]
    plain = length - tail - sum(map(len, groups))
    if plain < 0 or plain + tail > len(text):
        raise ValueError(f"{length} tokens: {len(text)} tokens of text and the needles do not make them")
    cuts = [plain * depth // DEPTHS for depth in range(DEPTHS + 1)]
    prompt = [token for depth, group in enumerate(groups) for token in (*group, *text[cuts[depth] : cuts[depth + 1]])]
    questions = [tokenizer.encode(one.question) for one in planted]
    answers = [tokenizer.encode(one.number) for one in planted]
    return Context(prompt, text[plain : plain + tail], planted, questions, answers)
