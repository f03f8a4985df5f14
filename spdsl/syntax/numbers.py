"""Number literals: exact, and bounded before they are converted."""

from __future__ import annotations

import re
from fractions import Fraction

from spdsl.limits import NUMBER_DIGITS, NUMBER_VALUE

_LITERAL = re.compile(r"-?[0-9]+(\.[0-9]+)?")


def read_number(text: str) -> Fraction:
    """The exact value of a decimal literal, with a sign if there is one.

    Raises ValueError, with the reason as its text, for anything else and for numbers beyond the limits.
    """
    if len(text) > 2 * NUMBER_DIGITS or sum(character.isdigit() for character in text) > NUMBER_DIGITS:
        raise ValueError(f"a number has at most {NUMBER_DIGITS} digits")
    if not _LITERAL.fullmatch(text):
        raise ValueError("a number is written in digits, with a point and more digits if needed")
    value = Fraction(text)
    if abs(value) > NUMBER_VALUE:
        raise ValueError(f"a number is at most {NUMBER_VALUE} (2^31 - 1)")
    return value
