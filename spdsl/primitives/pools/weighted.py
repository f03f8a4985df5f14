"""weighted: the sum of weight * (token + position), both learned for each place of a cell."""

from __future__ import annotations

from spdsl.ir.pool import Pool

POOL = Pool(
    "weighted",
    weights=(("weight", ("heads", "width")), ("position", ("heads", "width", "dim"))),
    kernels=(1, 2),  # backward: of the tokens, and of the weights
    each=3,
)
