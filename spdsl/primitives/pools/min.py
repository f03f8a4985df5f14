"""min: the least number of each dim, of the tokens of a cell."""

from __future__ import annotations

from spdsl.ir.pool import Pool

POOL = Pool("min", kernels=(1, 2))  # as of `max`
