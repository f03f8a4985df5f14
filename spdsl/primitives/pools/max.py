"""max: the greatest number of each dim, of the tokens of a cell."""

from __future__ import annotations

from spdsl.ir.pool import Pool

POOL = Pool("max", backward=("pool_entries", "spread_entries"))  # the places of the maxima are found again
