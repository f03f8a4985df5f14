"""softmax(stream): the sum of softmax(logit) * token over the cell, for each dim by itself; the logits are keys."""

from __future__ import annotations

from spdsl.ir.pool import Pool

POOL = Pool(
    "softmax",
    weighs=True,
    each=4,
)
