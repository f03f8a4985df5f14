"""extras: further results of `attention`: scores and their divergence, by torch where no kernel walks its lists.

By torch over all pairs of queries and entries, visible or not; or of queries and the keys of their lists, gathered for
each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from spdsl.cost import divergence
from spdsl.cost.chosen import scored_bytes
from spdsl.cost.divergence import Walk
from spdsl.cost.kernels import LSE_BYTES, NONE, Call, Kernel
from spdsl.ir.pattern import Choice, Kl, Phase, Pooled
from spdsl.ir.plan import SoftmaxPlan
from spdsl.passes.count import Number
from spdsl.passes.divergence import list_of, walked_by

PASSES = 3  # over scores in memory, in float32: logits written, made a score, reduced
GATHERED = 3  # over keys gathered for a query: read, written, read by the product
# Products of a backward for each of the forward: a piece is computed again; a score that learns has two gradients more.
AGAIN, LEARNED = 1, 3


@dataclass(frozen=True, slots=True)
class _Result:
    """A further result: the softmaxes whose logits it is made of, and the choice whose lists hold all that counts."""

    name: str
    sides: tuple[SoftmaxPlan, ...]
    choice: Choice | None = None


def forward(call: Call) -> Iterator[Kernel]:
    for result in _results(call):
        if isinstance(result, Walk):
            yield from divergence.forward(call, result)
        else:
            yield _kernel(call, result, result.name, [1] * len(result.sides))


def backward(call: Call) -> Iterator[Kernel]:
    """Of a divergence the last side alone learns."""
    for result in _results(call):
        if isinstance(result, Walk):
            yield from divergence.backward(call, result)
        else:
            times = [AGAIN] * (len(result.sides) - 1) + [LEARNED]
            yield _kernel(call, result, f"{result.name}, backward", times)


def _results(call: Call) -> Iterator[_Result | Walk]:
    """Those of the result that answers in training; generation has none."""
    if call.phase is not Phase.TRAIN:
        return
    plans = {one.name: one for one in call.count.plan.softmaxes}
    for number, extra in enumerate(call.count.case(call.phase).extras, 1):
        if isinstance(extra, Pooled):
            side = plans[extra.score.softmax.name]
            yield _Result(f"{side.name} as a result", (side,))
        elif isinstance(extra, Kl):
            target, score = (plans[side.score.softmax.name] for side in (extra.target, extra.score))
            if walked := walked_by(extra, target, score):
                yield Walk(f"result_{number}", target, score, walked)
            else:
                yield _Result(f"kl({target.name}, {score.name})", (target, score), list_of(extra, target, score))


def _kernel(call: Call, result: _Result, name: str, times: list[int]) -> Kernel:
    flops = machine = moved = read = NONE
    for softmax, often in zip(result.sides, times, strict=True):
        qk, _ = call.dims(softmax)
        pairs = call.many(call.count.heads(softmax.softmax) * call.queries * _scored(call, result, softmax)) * often
        flops += _visible(call, result, softmax) * (2 * qk * often * call.shape.batch)
        machine += pairs * (2 * qk)
        moved += pairs * (PASSES * LSE_BYTES) + _gathered(call, result, softmax) * often
        read += (call.rows_bytes(softmax, qk) + scored_bytes(call, softmax)) * often
    return Kernel(name, "extra", "select", launches=0, flops=flops, machine=machine, bytes=read, moved=moved + read)


def _visible(call: Call, result: _Result, softmax: SoftmaxPlan) -> Number:
    """Pairs that count, for all heads: on lists those that the target sees."""
    if result.choice is None:
        return call.pairs(softmax)
    target = result.sides[0]
    pairs = call.pairs(target)
    return Number(pairs.value // call.count.heads(target.softmax) * call.count.heads(softmax.softmax), pairs.exact)


def _scored(call: Call, result: _Result, softmax: SoftmaxPlan) -> int:
    """Entries of a query that are scored."""
    if result.choice:
        return call.capacity(result.choice) * result.choice.unit
    return call.count.entries(softmax.sweeps[0].stream)


def _gathered(call: Call, result: _Result, softmax: SoftmaxPlan) -> Number:
    if result.choice is None:
        return NONE
    qk, _ = call.dims(softmax)
    lists = call.lists(result.choice, softmax)
    numbers = lists * call.queries * _scored(call, result, softmax) * qk
    return call.many(numbers * call.shape.size * GATHERED)
