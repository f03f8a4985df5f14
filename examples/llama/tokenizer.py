"""Byte-pair encoding as SmolLM2 has it: digits stand alone, the rest is cut as GPT-2 cuts it. For ASCII texts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

# GPT-2's pieces: endings, words, other signs, spaces; of several spaces the last one belongs to the next word.
_PIECES = re.compile(r"\d|'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+| ?[^\sA-Za-z\d]+|\s+(?=\d)|\s+(?!\S)|\s+")


def _letters() -> dict[int, str]:
    """A printable sign for each byte, as GPT-2 chose them: those that print stand for themselves."""
    own = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {byte: chr(byte) for byte in own} | {byte: chr(256 + i) for i, byte in enumerate(others)}


_LETTERS = _letters()
_BYTES = {letter: byte for byte, letter in _LETTERS.items()}


class Tokenizer:
    def __init__(self, tokens: Sequence[str], merges: Sequence[str]) -> None:
        self.tokens = list(tokens)
        self.numbers = {token: number for number, token in enumerate(tokens)}
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        self._piece = cache(self._encoded)

    def encode(self, text: str) -> list[int]:
        """Raises ValueError for what is not ASCII: the pieces of other letters are not known here."""
        if not text.isascii():
            raise ValueError("the text is not ASCII")
        return [number for piece in _PIECES.findall(text) for number in self._piece(piece)]

    def decode(self, numbers: Sequence[int]) -> str:
        letters = "".join(self.tokens[number] for number in numbers)
        return bytes(_BYTES[letter] for letter in letters).decode("utf-8", "replace")

    def _encoded(self, piece: str) -> list[int]:
        parts = [_LETTERS[byte] for byte in piece.encode()]
        while len(parts) > 1:
            ranked = [(self.ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in self.ranks]
            if not ranked:
                break
            _, i = min(ranked)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return [self.numbers[part] for part in parts]
