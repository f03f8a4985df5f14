"""lengths: at which length a picture shows something, and what to say where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from spdsl.ir.pattern import Pattern
from spdsl.oracle.sketch import sketches
from spdsl.picture import LONGEST, Drawn

_SHORTEST = 256
_ENOUGH = 0.5  # of the pairs are hidden: the structure fills the picture
_LARGEST = 8  # this part of the length is the first size that is tried for a parameter
_SMALLEST = 16  # as kernels want units


def usual(pattern: Pattern) -> int:
    """The length of `expect`, if it can be drawn; else the shortest of 256, 512, ... with half of the pairs hidden.

    Where none is, up to LONGEST: LONGEST if something is hidden there, else the shortest.
    """
    expected = pattern.expected.length
    if expected is not None and expected <= LONGEST:
        return expected
    return telling(pattern, _SHORTEST) or _SHORTEST


def telling(pattern: Pattern, shortest: int) -> int | None:
    """The first of shortest, twice that, ... with half of the pairs hidden; LONGEST if fewer are; None if none is."""
    length, share = shortest, 0.0
    while length <= LONGEST:
        share = hidden(pattern, length)
        if share >= _ENOUGH:
            return length
        length *= 2
    return LONGEST if share > 0 else None


def hidden(pattern: Pattern, length: int) -> float:
    """The largest share of hidden pairs of its pictures; those of tokens count, where there are any."""
    found, _ = sketches(pattern, length)
    return max(one.sparsity for one in [one for one in found if one.stride == 1] or found)


def advice(drawn: Drawn, length: int) -> str:
    """What would show more, where nothing is hidden; else nothing."""
    if hidden(drawn.pattern, length) > 0:
        return ""
    said = f"nothing{' but later keys' if drawn.pattern.causal else ''} is hidden at {length} tokens"
    longer = telling(drawn.pattern, 2 * length)
    ways = ([f"--length {longer}"] if longer else []) + list(_values(drawn, length))[:1]
    if ways:
        return f"{said}: try {' or '.join(ways)}"
    return f"{said}, nor at any length up to {LONGEST}"


def _values(drawn: Drawn, length: int) -> Iterator[str]:
    """Options that make a parameter so small that half of the pairs are hidden, or at least some."""
    for name, value in drawn.pattern.params:
        shares = {}
        for size in _sizes(length, Fraction(str(value))):
            other = drawn.varied(name, Fraction(size))
            shares[size] = 0.0 if other is None else hidden(other, length)
            if shares[size] >= _ENOUGH:
                break
        if shares and max(shares.values()) > 0:
            yield f"-D {name}={max(shares, key=lambda size: shares[size])}"


def _sizes(length: int, below: Fraction) -> list[int]:
    largest = max(1, length // _LARGEST)
    sizes = [largest >> step for step in range(largest.bit_length()) if largest >> step >= min(largest, _SMALLEST)]
    return [size for size in sizes if size < below]
