"""min: the least number of each dim, of the tokens of a cell."""

from __future__ import annotations

from spdsl.ir.pool import Pool

POOL = Pool("min", backward=("pool_entries", "spread_entries"))  # as of `max`
