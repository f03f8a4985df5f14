"""Mutated sources: tokens of a corpus left out, doubled, exchanged, made extreme numbers, repeated in a chain."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from spdsl.primitives.registry import WORDS
from spdsl.resources import folder
from tests.fuzz.programs import EXTREME

# Coarser than the grammar on purpose: comments and blanks are tokens, too, so that the text is kept between them.
_TOKEN = re.compile(r"#[^\n]*|\s+|[A-Za-z_]\w*|[0-9]+(?:\.[0-9]+)?|//|<=|>=|==|!=|.", re.DOTALL)
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")
GARBAGE = ("\0", "\r", "\r\n", "\ufeff", "\u0430", "\u202e", "\U0001f642", "\u2028", "**", "{", "}", "\\", '"""', "]")
MOST = 100_000  # characters of a mutated source


def corpus(further: Path | None = None) -> list[str]:
    """The shipped patterns, the words' examples, and the `.spat` files of a further folder if there is one."""
    files = sorted(Path(folder("patterns")).glob("*.spat")) + (sorted(further.glob("**/*.spat")) if further else [])
    return [path.read_text(encoding="utf-8") for path in files] + [word.example for word in WORDS.values()]


class Mutations:
    """Draws mutated sources from one seed."""

    def __init__(self, seed: int, sources: Sequence[str]) -> None:
        self.rng = random.Random(seed)
        self.sources = [_TOKEN.findall(source) for source in sources]
        self.names = sorted({token for source in self.sources for token in source if token.isidentifier()})

    def source(self) -> str:
        """A source of the corpus after one to four steps."""
        tokens = list(self.rng.choice(self.sources))
        for _ in range(self.rng.choice([1, 1, 2, 4])):
            step = self.rng.choice([
                self._leave_out, self._double, self._exchange, self._rename, self._number, self._number, self._splice,
                self._garbage, self._chain, self._repeat,
            ])  # fmt: skip
            tokens = step(tokens) or ["x"]
        return "".join(tokens)[:MOST]

    def _place(self, tokens: Sequence[str]) -> int:
        return self.rng.randrange(len(tokens))

    def _span(self, tokens: Sequence[str]) -> tuple[int, int]:
        first = self._place(tokens)
        return first, min(len(tokens), first + self.rng.choice([1, 1, 2, 4, 16]))

    def _leave_out(self, tokens: list[str]) -> list[str]:
        first, end = self._span(tokens)
        return tokens[:first] + tokens[end:]

    def _double(self, tokens: list[str]) -> list[str]:
        first, end = self._span(tokens)
        return tokens[:end] + tokens[first:]

    def _exchange(self, tokens: list[str]) -> list[str]:
        i, j = self._place(tokens), self._place(tokens)
        tokens[i], tokens[j] = tokens[j], tokens[i]
        return tokens

    def _rename(self, tokens: list[str]) -> list[str]:
        tokens[self._place(tokens)] = self.rng.choice(self.names)
        return tokens

    def _number(self, tokens: list[str]) -> list[str]:
        numbers = [i for i, token in enumerate(tokens) if _NUMBER.fullmatch(token)]
        if numbers:
            tokens[self.rng.choice(numbers)] = self.rng.choice(EXTREME)
        return tokens

    def _splice(self, tokens: list[str]) -> list[str]:
        other = self.rng.choice(self.sources)
        first, end = self._span(other)
        place = self._place(tokens)
        return tokens[:place] + other[first:end] + tokens[place:]

    def _garbage(self, tokens: list[str]) -> list[str]:
        place = self._place(tokens)
        return [*tokens[:place], self.rng.choice(GARBAGE), *tokens[place:]]

    def _repeat(self, tokens: list[str]) -> list[str]:
        first, end = self._span(tokens)
        return tokens[:end] + tokens[first:end] * self.rng.choice([3, 30, 300]) + tokens[end:]

    def _chain(self, tokens: list[str]) -> list[str]:
        """A call within `|`, `&`, `-` and `,` again and again, each time with another number."""
        calls = [i for i, (a, b) in enumerate(pairwise(tokens)) if a in WORDS and b == "("]
        if not calls:
            return tokens
        first = self.rng.choice(calls)
        end, open_ = first + 1, 0
        while end < len(tokens):
            open_ += {"(": 1, ")": -1}.get(tokens[end], 0)
            end += 1
            if not open_:
                break
        call, joint = tokens[first:end], self.rng.choice([" | ", " & ", " - ", ", "])
        links: list[str] = []
        for i in range(self.rng.choice([2, 8, 40, 200])):
            links += [joint, *(str(int(float(token)) + i) if _NUMBER.fullmatch(token) else token for token in call)]
        return tokens[:end] + links + tokens[end:]
