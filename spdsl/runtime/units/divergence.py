"""The divergence of two scores over the units of lists: tiles of keys x queries, the heads of a list added up.

Products are [keys, rows], so that the heads of a query lie side by side and are added within few threads. What a query
sums is kept for each place of a block of keys, and added up once, behind the last block.
"""

from __future__ import annotations

from typing import NamedTuple

from spdsl.runtime.language import tl
from spdsl.runtime.tiles.kernel import LN2, jit
from spdsl.runtime.tiles.positions import span
from spdsl.runtime.tiles.tiles import at, load_qk, store_qk, token_pointer, zeros
from spdsl.runtime.units.packed import PackedRows


class Compared(NamedTuple):
    """A tile of queries: rows of the target, with lse in base 2 [M], rows of the score, and the queries themselves.

    position [1, LANES]; query and lane [LANES], and whether the query exists.
    """

    target: PackedRows
    lse: tl.tensor
    score: PackedRows
    position: tl.tensor
    query: tl.tensor
    lane: tl.tensor
    inside: tl.tensor


class ScoreGrads(NamedTuple):
    """What the backward knows of the queries of a tile, [LANES]: the gradient, and as `divergence_of` gives them."""

    grad: tl.tensor
    total: tl.tensor
    norm: tl.tensor


class KeyPair(NamedTuple):
    """One block of keys of the target and of the score in two parts each; `end` is the position after the last key."""

    k0: tl.tensor
    k1: tl.tensor
    entry0: tl.tensor
    entry1: tl.tensor
    position: tl.tensor
    end: tl.tensor
    length: tl.tensor


@jit
def of_queries(x, U):
    """[keys, rows] -> the sum over the rows of each query, [keys, LANES]."""
    return tl.sum(tl.reshape(x, (x.shape[0], U.LANES, x.shape[1] // U.LANES)), 2)


@jit
def to_rows(x, U, R):
    """[keys, LANES] -> the value of a query in each of its rows, [keys, rows]."""
    heads: tl.constexpr = R.BLOCK_M // U.LANES
    return tl.reshape(tl.broadcast_to(x[:, :, None], (R.BLOCK_N, U.LANES, heads)), (R.BLOCK_N, R.BLOCK_M))


@jit
def start_divergence(U, C):
    """-> total, gain, m, z before the first key."""
    nothing = tl.zeros((C.BLOCK_N, U.LANES), dtype=C.ACC)
    return nothing, nothing, tl.full((C.BLOCK_N, U.LANES), float("-inf"), C.ACC), nothing


@jit
def divergence_step(total, gain, m, z, p, r):
    """Adds one block: total of p, gain of p (log p - r), z of exp2(r - m), m the running maximum of r; in base 2."""
    total += p
    gain += p * (tl.log2(tl.where(p > 0.0, p, 1.0)) - tl.where(p > 0.0, r, 0.0))
    m_new = tl.maximum(m, r)
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # no key so far: -inf - -inf would be NaN
    z = z * tl.exp2(m - shift) + tl.exp2(r - shift)
    return total, gain, m_new, z


@jit
def divergence_of(total, gain, m, z):
    """-> divergence, total of the target and log-sum-exp of the score in base 2, [LANES]; 0, 1, inf without a key."""
    top = tl.max(m, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    norm = top + tl.log2(tl.sum(z * tl.exp2(m - shift[None, :]), 0))
    total, gain = tl.sum(total, 0), tl.sum(gain, 0)
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    found = (gain / total - tl.log2(total) + norm) * LN2
    return tl.where(empty, 0.0, found), total, tl.where(empty, float("inf"), norm)


@jit
def score_gradient(p, r, grads):
    """Of the logits of the score, [keys, LANES]: softmax r - p."""
    found = tl.exp2(r - grads.norm[None, :]) - p / grads.total[None, :]
    return grads.grad[None, :] * found


@jit
def load_queries(x, tile, other):
    """One value per query; x is a Strided from the first token of the sequence and the list head on."""
    return tl.load(x.data + tile.query.to(tl.int64) * x.token, mask=tile.inside, other=other)


@jit
def store_queries(x, tile, values):
    tl.store(x.data + tile.query.to(tl.int64) * x.token, values, mask=tile.inside)


@jit
def load_score_grads(grad, total, norm, s, list_head, q_start, tile):
    return ScoreGrads(
        load_queries(at(grad, s, list_head, q_start), tile, 0.0),
        load_queries(at(total, s, list_head, q_start), tile, 1.0),
        load_queries(at(norm, s, list_head, q_start), tile, float("inf")),
    )


@jit
def store_key_slot(buffer, list_head, slot, part, dk0, dk1, U, R):
    """One block of a unit in the buffer [H, slots, UNIT, QK_DIM]."""
    start = at(buffer, 0, list_head, slot).data + tl.cast(part, tl.int64) * (R.BLOCK_N * R.QK_DIM)
    store_qk(start, R.QK_DIM, R.BLOCK_N, dk0, dk1, R.BLOCK_N, R)


@jit
def add_key_slots(buffer, dk, source, inverse, U, R):
    """One program: one block of a unit whose jobs were several; adds their parts in order."""
    job, list_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    entry = tl.cast(list_head, tl.int64) * inverse.jobs + job
    parts = tl.load(inverse.parts + entry)
    if parts == 0:
        return
    slot, s = tl.load(inverse.slot + entry), tl.load(inverse.sequence + entry)
    dk0 = zeros(R.BLOCK_N, R.QK0, R.ACC)
    dk1 = zeros(R.BLOCK_N, R.QK1, R.ACC)
    for i in tl.range(0, parts):
        start = at(buffer, 0, list_head, slot + i).data + tl.cast(part, tl.int64) * (R.BLOCK_N * R.QK_DIM)
        part0, part1 = load_qk(start, R.QK_DIM, R.BLOCK_N, R.BLOCK_N, True, R)
        dk0 += part0
        dk1 += part1
    k_start, k_count = span(source.spans, s, source.keys)
    key = tl.load(inverse.unit + entry) * U.UNIT + part * R.BLOCK_N
    dk = at(dk, s, list_head, k_start)
    store_qk(token_pointer(dk, key), dk.token, k_count - key, dk0, dk1, R.BLOCK_N, R)
