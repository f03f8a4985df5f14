"""max: the greatest number of each dim, of the tokens of a cell."""

from __future__ import annotations

from spdsl.ir.pool import Pool

POOL = Pool("max", kernels=(1, 2))  # backward: the places of the maxima are found again, then spread
