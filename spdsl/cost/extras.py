"""extras: further results of `attention` that torch computes: scores and their divergence.

Over all pairs of queries and entries, visible or not; or of queries and the keys of their lists, gathered for each.
"""

from __future__ import annotations

from spdsl.cost.choose import scored_bytes
from spdsl.cost.kernels import LSE_BYTES, NONE, Call, Kernel
from spdsl.ir.plan import SoftmaxPlan
from spdsl.ir.schedule import Scores, Step
from spdsl.passes.count import Number

PASSES = 3  # over scores in memory, in float32: logits written, made a score, reduced
GATHERED = 3  # over keys gathered for a query: read, written, read by the product
# Products of a backward for each of the forward: a piece is computed again; a score that learns has two gradients more.
AGAIN, LEARNED = 1, 3


def forward(call: Call, step: Step[Scores]) -> Kernel:
    return _kernel(call, step, [1] * len(step.of.sides))


def backward(call: Call, step: Step[Scores]) -> Kernel:
    """Of a divergence the last side alone learns."""
    return _kernel(call, step, [AGAIN] * (len(step.of.sides) - 1) + [LEARNED])


def _kernel(call: Call, step: Step[Scores], times: list[int]) -> Kernel:
    flops = machine = moved = read = NONE
    for softmax, often in zip(step.of.sides, times, strict=True):
        qk, _ = call.dims(softmax)
        pairs = call.many(call.count.heads(softmax.softmax) * call.queries * _scored(call, step.of, softmax)) * often
        flops += _visible(call, step.of, softmax) * (2 * qk * often * call.shape.batch)
        machine += pairs * (2 * qk)
        moved += pairs * (PASSES * LSE_BYTES) + _gathered(call, step.of, softmax) * often
        read += (call.rows_bytes(softmax, qk) + scored_bytes(call, softmax)) * often
    return Kernel(step.name, "extra", "select", flops=flops, machine=machine, bytes=read, moved=moved + read)


def _visible(call: Call, result: Scores, softmax: SoftmaxPlan) -> Number:
    """Pairs that count, for all heads: on lists those that the target sees."""
    if result.choice is None:
        return call.pairs(softmax)
    target = result.sides[0]
    pairs = call.pairs(target)
    return Number(pairs.value // call.count.heads(target.softmax) * call.count.heads(softmax.softmax), pairs.exact)


def _scored(call: Call, result: Scores, softmax: SoftmaxPlan) -> int:
    """Entries of a query that are scored."""
    if result.choice:
        return call.capacity(result.choice) * result.choice.unit
    return call.count.entries(softmax.sweeps[0].stream)


def _gathered(call: Call, result: Scores, softmax: SoftmaxPlan) -> Number:
    if result.choice is None:
        return NONE
    qk, _ = call.dims(softmax)
    lists = call.lists(result.choice, softmax)
    numbers = lists * call.queries * _scored(call, result, softmax) * qk
    return call.many(numbers * call.shape.size * GATHERED)
