"""Which keys a tile of rows visits, on the host: for the CPU path."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from spdsl.runtime.sequences import Corner

CPU_BLOCK = 64  # keys per block where a CPU tile asks the tensors what it visits


def visits_of_ranges(ranges: Iterable[tuple[int, int, int, int]], corner: Corner) -> list[tuple[int, int, bool]]:
    """Position ranges (first, end, full_first, full_end), by `first` -> disjoint key ranges (first, end, full)."""
    count, origin, cursor = corner.keys.stop - corner.keys.start, corner.k_origin, 0
    found: list[tuple[int, int, bool]] = []
    for bounds in ranges:
        first, end, full_first, full_end = (min(max(bound - origin, 0), count) for bound in bounds)
        first = max(first, cursor)
        if first >= end:
            continue
        full_first = min(max(full_first, first), end)
        full_end = max(min(full_end, end), full_first)
        found += [(first, full_first, False), (full_first, full_end, True), (full_end, end, False)]
        cursor = end
    return _joined(found)


def visits_of_blocks(may: Tensor, must: Tensor, block: int, count: int) -> list[tuple[int, int, bool]]:
    """Block maps [..., blocks] of one row tile -> disjoint key ranges; a block counts if any head visits it."""
    visited = may.flatten(0, -2).any(0).tolist()
    full = must.flatten(0, -2).all(0).tolist()
    return _joined(
        [
            (i * block, min((i + 1) * block, count), full[i] and (i + 1) * block <= count)
            for i, here in enumerate(visited)
            if here
        ]
    )


def _joined(ranges: list[tuple[int, int, bool]]) -> list[tuple[int, int, bool]]:
    """Neighbours of one kind become one range; empty ones go."""
    joined: list[tuple[int, int, bool]] = []
    for first, end, full in ranges:
        if first >= end:
            continue
        if joined and joined[-1][1] == first and joined[-1][2] == full:
            joined[-1] = (joined[-1][0], end, full)
        else:
            joined.append((first, end, full))
    return joined
