"""softmax(stream): the sum of softmax(logit) * token over the cell, for each dim by itself; the logits are keys."""

from __future__ import annotations

from spdsl.ir.pool import Operators, Pool

POOL = Pool(
    "softmax",
    weighs=True,
    operators=Operators(forward=5, backward=8, clipped=12, clipped_backward=3),
    each=4,
)
