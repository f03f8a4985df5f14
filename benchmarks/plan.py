"""The time to know which keys every row tile visits: nothing is stored, a tile's ranges follow from its rows."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.baselines import ours
from benchmarks.workload import Workload

TILE_ROWS = 160  # as the CPU path cuts them


def plan(work: Workload, tokens: int) -> dict[str, Any]:
    """`first_s`: until the last tile's ranges are known, with no other asked before; `steady_s`: all tiles in turn."""
    visits = ours.visits(work, tokens)
    start = time.perf_counter()
    last = visits(tokens - TILE_ROWS, tokens)
    first_s = time.perf_counter() - start
    start = time.perf_counter()
    tiles = [visits(first, min(first + TILE_ROWS, tokens)) for first in range(0, tokens, TILE_ROWS)]
    steady_s = time.perf_counter() - start
    seen = max(sum(end - first for first, end, _ in ranges) for ranges in (*tiles, last))
    return {"first_s": first_s, "steady_s": steady_s, "tiles": len(tiles), "most_keys": seen}
