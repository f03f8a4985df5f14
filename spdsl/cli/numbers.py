"""Numbers on the command line, read alike everywhere: `4096`, `0.5`, `64k`, `1M`; lengths also `4k..64k`, `8k,16k`."""

from __future__ import annotations

import re
from fractions import Fraction

from spdsl.limits import NUMBER_VALUE
from spdsl.syntax.numbers import read_number

SCALES = {"": 1, "k": 1 << 10, "m": 1 << 20}
_NUMBER = re.compile(r"(-?[0-9]+(?:\.[0-9]+)?)([kKmM]?)")
_MOST_LENGTHS = 64  # of one option: more rows than anybody reads


def number(text: str) -> Fraction:
    """The exact value. Raises ValueError with the reason."""
    written = _NUMBER.fullmatch(text.strip())
    if written is None:
        raise ValueError(
            f"`{text}` is no number: one is written in digits, as 4096, 0.5, 64k or 1M (k is 1024, M is 1024 * 1024)"
        )
    value = read_number(written[1]) * SCALES[written[2].lower()]
    if abs(value) > NUMBER_VALUE:
        raise ValueError(f"`{text}` is too large: a number is at most {NUMBER_VALUE} (2^31 - 1)")
    return value


def tokens(text: str) -> int:
    """One length: a whole number of tokens, at least 1. Raises ValueError."""
    if "," in text or ".." in text:
        raise ValueError(f"`{text}` stands for several lengths, and one is expected, such as 64k")
    no_length = f"`{text}` is no number of tokens below 2**31, such as 65536, 64k or 1M"
    try:
        value = number(text)
    except ValueError:
        raise ValueError(no_length) from None
    if value < 1:
        raise ValueError(f"{no_length}: it is not in the range, which begins at 1")
    if value.denominator > 1:
        raise ValueError(f"{no_length}: it is not whole")
    return int(value)


def lengths(text: str) -> tuple[int, ...]:
    """Lengths, rising: `8k`, `8k,16k`, or `4k..64k`, which is 4k, doubled below 64k, and 64k. Raises ValueError."""
    every = {length for part in text.split(",") for length in _range(part)}
    if len(every) > _MOST_LENGTHS:
        raise ValueError(f"`{text}` stands for {len(every)} lengths, and at most {_MOST_LENGTHS} are taken")
    return tuple(sorted(every))


def _range(text: str) -> list[int]:
    from spdsl.cost.estimate import doubling

    first, dots, last = text.partition("..")
    low, high = tokens(first), tokens(last if dots else first)
    if low > high:
        raise ValueError(f"`{text}` ends before it begins")
    return doubling(low, high)
