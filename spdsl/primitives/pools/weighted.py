"""weighted: the sum of weight * (token + position), both learned for each place of a cell."""

from __future__ import annotations

from spdsl.ir.pool import Pool

POOL = Pool(
    "weighted",
    weights=(("weight", ("heads", "width")), ("position", ("heads", "width", "dim"))),
    backward=("spread_entries", "weight_sums"),
    each=3,
)
