"""together: how the branches of a result become one, and which result answers."""

from __future__ import annotations

from collections.abc import Iterator

from spdsl.cost.kernels import LSE_BYTES, NONE, Call, Kernel
from spdsl.ir.pattern import Branch, Gate, Merge, Phase, Values
from spdsl.ir.plan import Role, SoftmaxPlan
from spdsl.passes.count import Number
from spdsl.passes.joint import leaves

# Operators of torch, as the tests count them in generated modules.
LSE_STEPS = 1  # one lse per branch, beside each other
MERGE_STEPS = 24  # of two branches
SINK_STEPS = 12  # the gradient of one
SETTLE_STEPS = 3  # a condition, and the choice of out and lse by it


def forward(call: Call) -> Iterator[Kernel]:
    """How the branches of each result become one, of whole sequences or chunks."""
    for branch in _branches(call):
        found = _bytes(call, branch)
        if isinstance(branch, Gate):
            yield Kernel("gate_rows", "combine", "copy", 1, LSE_STEPS, bytes=found, moved=found)
        elif isinstance(branch, Merge):
            if _joint(call, branch) or call.phase is not Phase.TRAIN:
                yield Kernel("merge_rows", "combine", "copy", bytes=found, moved=found)
            else:
                yield Kernel("merge", "combine", "copy", 0, MERGE_STEPS, bytes=found, moved=found)


def settled(call: Call) -> Iterator[Kernel]:
    """Which of the results of a call with a cache answers."""
    conditions = [one for one in call.plan.pattern.cases_of(call.phase) if one.condition is not None]
    if conditions:
        moved = _bytes(call, conditions[0].branch) * len(conditions)
        steps = SETTLE_STEPS * len(conditions)
        yield Kernel("choice of results", "combine", "copy", 0, steps, bytes=moved, moved=moved)


def backward(call: Call) -> Iterator[Kernel]:
    for branch in _branches(call):
        found = _bytes(call, branch) * 2
        if isinstance(branch, Gate):
            yield Kernel("gate_gradients", "combine", "copy", 1, bytes=found, moved=found)
        elif isinstance(branch, Merge) and not _joint(call, branch):
            yield Kernel("merge, backward", "combine", "copy", 0, MERGE_STEPS, bytes=found, moved=found)
    yield from _sums(call)


def _sums(call: Call) -> Iterator[Kernel]:
    """What several softmaxes have of the gradient of one tensor is added up; and sinks get theirs by torch."""
    plans = [one for one in call.softmaxes if one.role is Role.BRANCH]
    tensors = [tensor for one in plans for tensor in _learned(call, one)]
    again = [size for i, (name, size) in enumerate(tensors) if name in {other for other, _ in tensors[:i]}]
    sinks = [one for one in plans if one.softmax.sink]
    if again:
        moved = sum(again, NONE) * 3
        yield Kernel("sums of gradients", "combine", "copy", 0, len(again), bytes=moved, moved=moved)
    if sinks:
        moved = sum((call.rows_bytes(one, 2 * call.dims(one)[1]) for one in sinks), NONE)
        yield Kernel("sinks, backward", "combine", "copy", 0, SINK_STEPS * len(sinks), bytes=moved, moved=moved)


def _learned(call: Call, softmax: SoftmaxPlan) -> Iterator[tuple[str, Number]]:
    """The tensors that get a gradient, and their bytes; a sink has next to none."""
    qk, _ = call.dims(softmax)
    yield softmax.softmax.query, call.rows_bytes(softmax, qk)
    if softmax.softmax.sink:
        yield softmax.softmax.sink, NONE
    for sweep in softmax.sweeps:
        heads, keys_qk, keys_v = call.count.stream(sweep.stream)
        numbers = heads * call.count.entries(sweep.stream) * call.shape.size
        yield f"k of {sweep.stream.name}", call.many(numbers * keys_qk)
        if sweep.stream.value is Values.OWN:
            yield f"v of {sweep.stream.name}", call.many(numbers * keys_v)


def _joint(call: Call, branch: Branch) -> bool:
    return leaves(branch) in {one.parts for one in call.plan.joints}


def _branches(call: Call) -> Iterator[Branch]:
    """What is put together, from the inside out; with a cache every case is computed."""
    cases = [call.count.case(call.phase)] if call.phase is Phase.TRAIN else call.plan.pattern.cases_of(call.phase)
    for case in cases:
        for result in (case.branch, *case.extras):
            if isinstance(result, Gate):
                yield from result.branches
            if isinstance(result, Branch):
                yield result


def _bytes(call: Call, branch: Branch) -> Number:
    parts = len(branch.branches) if isinstance(branch, Gate | Merge) else 1
    heads, v = call.shape.heads, call.shape.v
    return call.many(call.queries * heads * ((parts + 1) * v * call.shape.size + parts * LSE_BYTES))
