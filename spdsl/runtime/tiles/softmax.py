"""The online softmax that every forward and decode kernel runs: one block of scores at a time."""

from __future__ import annotations

from spdsl.runtime.language import tl
from spdsl.runtime.tiles.kernel import LOG2E, jit
from spdsl.runtime.tiles.tiles import dot


@jit
def start_softmax(sink, h, C):
    """-> m, total before the first key.  A sink is a key without value that every row sees, there from the start."""
    m = tl.full((C.BLOCK_M,), float("-inf"), C.ACC)
    total = tl.zeros((C.BLOCK_M,), dtype=C.ACC)
    if sink is not None:
        m = tl.zeros((C.BLOCK_M,), dtype=C.ACC) + tl.load(sink + h).to(C.ACC) * LOG2E
        total = tl.where(m == float("-inf"), 0.0, 1.0).to(C.ACC)
    return m, total


@jit
def softmax_step(s, unit, m, total):
    """-> p, decay, m, total with one more block of scores s, which are in base 2 once multiplied by `unit`.

    m is the running maximum and total the sum of p = exp2(s - m); earlier sums shrink by decay.
    """
    m_new = tl.maximum(m, tl.max(s, 1) * unit)
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # no key so far: -inf - -inf would be NaN
    p = tl.exp2(s * unit - shift[:, None])
    decay = tl.exp2(m - shift)
    return p, decay, m_new, total * decay + tl.sum(p, 1)


@jit
def add_values(acc0, acc1, p, decay, v0, v1, C):
    """Adds p v to both parts of the output."""
    p = p.to(v0.dtype)
    acc0 = dot(p, v0, acc0 * decay[:, None], C)
    if C.V1:
        acc1 = dot(p, v1, acc1 * decay[:, None], C)
    return acc0, acc1
