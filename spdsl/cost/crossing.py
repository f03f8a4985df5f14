"""crossing: the lengths at which one cost overtakes another, on whole numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

Cost = Callable[[int], float]


@dataclass(frozen=True, slots=True)
class Crossing:
    """From `length` on the first cost is the lower one, or (`wins` false) no longer is."""

    length: int
    wins: bool


def crossings(first: Cost, second: Cost, lengths: Sequence[int], grain: int = 1) -> list[Crossing]:
    """Every change between neighbours of `lengths` (rising), to the next multiple of `grain` tokens.

    Two changes within one gap are not seen.
    """
    wins = [first(length) < second(length) for length in lengths]
    changes = []
    for i in range(1, len(lengths)):
        if wins[i] != wins[i - 1]:
            changes.append(Crossing(_first(first, second, lengths[i - 1], lengths[i], wins[i], grain), wins[i]))
    return changes


def _first(first: Cost, second: Cost, low: int, high: int, wins: bool, grain: int) -> int:
    """A length of (low, high] from which `first < second` is `wins`, and one grain before it is not."""
    below, above = low // grain, -(-high // grain)
    while above - below > 1:
        middle = (below + above) // 2
        if (first(middle * grain) < second(middle * grain)) == wins:
            above = middle
        else:
            below = middle
    return min(high, above * grain)


def told(changes: Sequence[Crossing], wins_first: bool, lengths: Sequence[int]) -> str:
    """A sentence for people."""
    if not changes:
        always = f"always faster than dense from {lengths[0]:,} to {lengths[-1]:,} tokens"
        return always if wins_first else f"never faster than dense up to {lengths[-1]:,} tokens"
    parts = [f"{'faster' if change.wins else 'slower'} than dense from {change.length:,} tokens" for change in changes]
    return ", ".join(parts)


# ---- selectors that look at every key


def selector_length(per_pair: int, per_token: int, attention_per_token: int) -> int | None:
    """The first length at which a selector that scores every pair costs as much as the attention that it selects for.

    All numbers are FLOPs: `per_pair` of the selector for each key that a query sees, half of the length on average;
    `per_token` for each token once; `attention_per_token` of the attention over what was selected. None: it never does.
    """
    if per_pair < 1:
        return None
    return max(0, -(2 * (per_token - attention_per_token) // per_pair))


def page_share(page: int, budget: int, length: int, vectors: int = 2) -> Fraction:
    """Bytes of a decode step that scores pages and reads the best, over those of dense attention.

    The scorer reads `vectors` vectors for each page of keys (their least and greatest: Quest), then `budget` tokens are
    read, keys and values: vectors / (2 page) + budget / length.
    """
    return Fraction(vectors, 2 * page) + Fraction(min(budget, length), length)
