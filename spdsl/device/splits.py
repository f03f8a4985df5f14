"""splits: how many programs share the keys of one decode step, from host numbers alone: the grid is fixed."""

from __future__ import annotations

from collections.abc import Iterable

_KEYS_PER_SPLIT = 128  # fewer keys do not pay for one more partial result
_MOST_SPLITS = 128
_PROGRAMS_PER_PROCESSOR = 2


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
