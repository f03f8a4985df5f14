"""mean: the mean of the tokens of a cell."""

from __future__ import annotations

from spdsl.ir.pool import Pool

POOL = Pool("mean", kernels=(1, 1))
