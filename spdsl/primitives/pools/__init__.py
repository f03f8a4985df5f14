"""The pools of `compress(by = ...)`, a record in a file for each. A new one is a file beside these and a line here."""

from __future__ import annotations

from spdsl.ir.pool import Pool
from spdsl.primitives.pools import cohesion_mean, cohesion_min, max, mean, min, mlp, softmax, weighted

POOLS: dict[str, Pool] = {
    module.POOL.name: module.POOL for module in (mean, max, min, weighted, mlp, softmax, cohesion_mean, cohesion_min)
}
