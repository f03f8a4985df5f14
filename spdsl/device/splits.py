"""splits: how many programs share the keys of one decode step, from host numbers alone: the grid is fixed."""

from __future__ import annotations

_KEYS_PER_SPLIT = 128  # fewer keys do not pay for one more partial result
_MOST_SPLITS = 128
_PROGRAMS_PER_PROCESSOR = 2


def split_count(groups: int, keys: int, processors: int) -> int:
    """Splits that fill the device when each of `groups` programs visits at most `keys` keys."""
    fill = -(-_PROGRAMS_PER_PROCESSOR * processors // max(groups, 1))
    return max(1, min(fill, keys // _KEYS_PER_SPLIT, _MOST_SPLITS))
