"""work: FLOPs and bytes of the kernels of one forward and one backward pass over whole sequences, from the counts.

Visible pairs only, each product once: what a perfect kernel would do. A product of d numbers is 2 d FLOPs; exponentials
are not counted. Bytes: every tensor once, so a floor.
"""

from __future__ import annotations

from dataclasses import dataclass

from spdsl.ir.pattern import Phase, Stream, Values
from spdsl.ir.plan import ChoicePlan, Plan, Role, SoftmaxPlan
from spdsl.passes.count import Count, Number
from spdsl.passes.visible import DependsOnData
from spdsl.primitives.pools import POOLS

LSE_BYTES = 4  # float32
INDEX_BYTES = 4  # int32


@dataclass(frozen=True, slots=True)
class Work:
    kernel: str
    flops: Number | None  # None: only the values of tensors tell
    bytes: int


def forward(count: Count) -> list[Work]:
    """The kernels of `attention`: entries, each softmax, each selection."""
    softmaxes = count.softmaxes(Phase.TRAIN)
    made = [compressed(count, stream) for stream in streams(count.plan) if used(softmaxes, stream)]
    done = [attended(count, one, 1, 1) for one in softmaxes if one.role is not Role.LOGITS]
    return made + done + [selected(count, one) for one in count.choices(Phase.TRAIN)]


def backward(count: Count) -> list[Work]:
    """The gradients of each softmax by the five products s, dp, dq, dk, dv; what kernels compute twice counts once."""
    return [attended(count, one, 3, 2) for one in count.softmaxes(Phase.TRAIN) if one.role is Role.BRANCH]


def streams(plan: Plan) -> list[Stream]:
    return [one for one in plan.pattern.inputs if isinstance(one, Stream) and one.compress is not None]


def used(softmaxes: list[SoftmaxPlan], stream: Stream) -> bool:
    return any(sweep.stream.name == stream.name for one in softmaxes for sweep in one.sweeps)


def attended(count: Count, softmax: SoftmaxPlan, of_qk: int, of_v: int) -> Work:
    """A softmax with so many products of length qk and of length v for each pair: 1 and 1 forward, 3 and 2 backward."""
    _, qk, v = count.stream(softmax.sweeps[0].stream)
    branch = softmax.role is Role.BRANCH
    name = f"{softmax.name}_{'forward' if of_qk == 1 else 'backward'}"
    products = 2 * (of_qk * qk + (of_v * v if branch else 0)) * count.shape.batch
    moved = rows_bytes(count, softmax, qk, v if branch else 0) + keys_bytes(count, softmax, branch)
    pairs = known_pairs(count, softmax)
    passes = 1 if of_qk == 1 else 2  # the backward reads each tensor and writes its gradient
    return Work(name, None if pairs is None else pairs * products, passes * moved)


def known_pairs(count: Count, softmax: SoftmaxPlan) -> Number | None:
    try:
        return count.pairs(softmax)
    except DependsOnData:
        return None


def rows_bytes(count: Count, softmax: SoftmaxPlan, qk: int, v: int) -> int:
    """q, out and lse; the lists that the softmax walks."""
    rows = count.shape.batch * count.length
    own = rows * count.heads(softmax.softmax) * ((qk + v) * count.shape.size + LSE_BYTES)
    choice = softmax.units
    if choice is None:
        return own
    return own + rows * count.lists(choice, softmax.softmax) * (choice.capacity or 0) * INDEX_BYTES


def keys_bytes(count: Count, softmax: SoftmaxPlan, values: bool) -> int:
    total = 0
    for sweep in softmax.sweeps:
        heads, qk, v = count.stream(sweep.stream)
        own = v if values and sweep.stream.value is Values.OWN else 0
        total += heads * count.entries(sweep.stream) * (qk + own)
    return total * count.shape.batch * count.shape.size


def selected(count: Count, plan: ChoicePlan) -> Work:
    """The logits of the score again, and the lists."""
    score = plan.choice.score
    assert score is not None
    softmax = next(one for one in count.plan.softmaxes if one.name == score.softmax.name)
    _, qk, _ = count.stream(softmax.sweeps[0].stream)
    rows = count.shape.batch * count.length
    lists = count.lists(plan.choice, score.softmax)
    moved = rows_bytes(count, softmax, qk, 0) + keys_bytes(count, softmax, False)
    moved += rows * lists * (plan.choice.capacity or 0) * INDEX_BYTES
    pairs = known_pairs(count, softmax)
    return Work(f"{plan.choice.name}_select", None if pairs is None else pairs * (2 * qk * count.shape.batch), moved)


def compressed(count: Count, stream: Stream) -> Work:
    """Entries from their source, K and V; a network has 2 qk hidden numbers, as in `example_inputs`."""
    heads, qk, v = count.stream(stream)
    entries, width = count.entries(stream), stream.grid.width
    assert stream.compress is not None
    each = sum(POOLS[stream.compress.by].work(width, d, 2 * qk) for d in (qk, v))
    flops = count.shape.batch * heads * entries * each
    moved = count.shape.batch * heads * (count.length + entries) * (qk + v) * count.shape.size
    return Work(f"{stream.name}_compress", Number(flops), moved)
