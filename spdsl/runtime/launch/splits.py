"""splits: how many programs share the keys of one decode step, from host numbers alone: the grid is fixed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

_KEYS_PER_SPLIT = 128  # fewer keys do not pay for one more partial result
_MOST_SPLITS = 128
_PROGRAMS_PER_PROCESSOR = 2


def lengths_to_try(most: int) -> Iterator[int]:
    """Lengths at which a step may visit most, up to `most` tokens: sets that begin anew do so at different places."""
    yield most
    yield from (most - (1 << i) for i in range((most - 1).bit_length()))


@lru_cache(maxsize=1024)  # every step of generation asks the same
def most_visited(visits: Callable[[int, int], Iterable[tuple[int, int, int, int]]], tokens: int, keys: int) -> int:
    """About as many keys as a step visits at any length up to `tokens`; visits(q, length) are ranges of its keys."""
    return max(reach(visits(length - 1, length), keys) for length in lengths_to_try(tokens))


def reach(ranges: Iterable[tuple[int, int, int, int]], keys: int) -> int:
    """Keys below `keys` in ranges (first, end, ..) in order, each once."""
    found, cursor = 0, 0
    for first, end, *_ in ranges:
        first, end = max(first, cursor), min(end, keys)
        if first < end:
            found, cursor = found + end - first, end
    return found


def split_count(groups: int, keys: int, processors: int) -> int:
    """Splits that fill the device when each of `groups` programs visits at most `keys` keys."""
    fill = -(-_PROGRAMS_PER_PROCESSOR * processors // max(groups, 1))
    return max(1, min(fill, keys // _KEYS_PER_SPLIT, _MOST_SPLITS))


def runs_in_splits(capacity: int, restart: int) -> int:
    """Programs that share the keys of a step: whole runs each. A maximum that never begins anew has one program."""
    return max(1, min(-(-capacity // restart), _MOST_SPLITS)) if restart else 1
