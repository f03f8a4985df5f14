"""cohesion_mean: how alike the tokens of a cell are, for `cohesion(cells)`; no way of `by =` to compress."""

from __future__ import annotations

from spdsl.ir.pool import Closing, Pool

POOL = Pool("cohesion_mean", closing=Closing.CELLS, each=4, named=False)
