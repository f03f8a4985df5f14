"""cohesion_min: how far the token of a cell is that is least like its mean, for `cohesion(cells, by = min)`."""

from __future__ import annotations

from spdsl.ir.pool import Closing, Pool

POOL = Pool("cohesion_min", closing=Closing.CELLS, each=6, named=False)
