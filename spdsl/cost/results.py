"""results: what it costs that the parts of a result become one, which result answers, and the same backward."""

from __future__ import annotations

from spdsl.cost import attend, units
from spdsl.cost.entries import dim_of
from spdsl.cost.kernels import LSE_BYTES, NONE, Call, Kernel
from spdsl.ir.pattern import Branch, Case, Gate, Merge
from spdsl.ir.plan import Joint, SoftmaxPlan
from spdsl.ir.schedule import Gradient, Step
from spdsl.passes.count import Number
from spdsl.passes.joint import leaves


def combined(call: Call, step: Step[Branch | Joint]) -> Kernel:
    """Parts read, and their result written: by a gate, or by a merge."""
    moved = _bytes(call, step.of)
    return Kernel(step.name, "combine", "copy", bytes=moved, moved=moved)


def uncombined(call: Call, step: Step[Branch]) -> Kernel:
    moved = _bytes(call, step.of) * 2
    return Kernel(step.name, "combine", "copy", bytes=moved, moved=moved)


def small(call: Call, step: Step[object]) -> Kernel:
    """A number for each sequence, row or head: next to no bytes."""
    return Kernel(step.name, "combine", "copy")


def settled(call: Call, step: Step[tuple[Case, ...]]) -> Kernel:
    """Which of the results of a call with a cache answers."""
    moved = _bytes(call, step.of[0].branch) * len(step.of)
    return Kernel(step.name, "combine", "copy", bytes=moved, moved=moved)


def sums(call: Call, step: Step[tuple[Gradient, ...]]) -> Kernel:
    """What comes to a gradient that is there already; that of a sink has next to no bytes."""
    moved = sum((_gradient(call, gradient) for gradient in step.of), NONE) * 3
    return Kernel(step.name, "combine", "copy", bytes=moved, moved=moved)


def sink_gradient(call: Call, step: Step[SoftmaxPlan]) -> Kernel:
    moved = call.rows_bytes(step.of, 2 * call.dims(step.of)[1])
    return Kernel(step.name, "combine", "copy", bytes=moved, moved=moved)


def _gradient(call: Call, gradient: Gradient) -> Number:
    softmax, side = gradient.softmax, gradient.side
    if softmax is not None:
        output = gradient.name == f"{softmax.name}.out"
        return NONE if gradient.name == softmax.softmax.sink else call.rows_bytes(softmax, call.dims(softmax)[output])
    if side is None:
        return NONE
    heads = call.count.stream(side.stream)[0]
    return call.many(heads * call.count.entries(side.stream) * call.shape.size * dim_of(call, side))


def _bytes(call: Call, branch: Branch | Joint) -> Number:
    parts = len(branch.branches) if isinstance(branch, Gate | Merge) else 1
    parts = len(branch.parts) if isinstance(branch, Joint) else parts
    heads, v = call.shape.heads, call.shape.v
    return call.many(call.queries * heads * ((parts + 1) * v * call.shape.size + parts * LSE_BYTES))


# ---- a decode step: whoever reads a result merges the splits that its kernels left, in float32, read once


def joined(call: Call, step: Step[Branch]) -> Kernel:
    moved = _written(call, step.of)
    for softmax in (other for other in call.softmaxes if other.name in leaves(step.of)):
        _, v = call.dims(softmax)
        moved += _splits(call, softmax) * ((v + 1) * LSE_BYTES)
    return Kernel(step.name, "combine", "copy", bytes=moved, moved=moved)


def _splits(call: Call, softmax: SoftmaxPlan) -> Number:
    """Of all heads."""
    splits = (attend.splits if softmax.units is None else units.splits)(call, softmax)
    return call.many(call.count.heads(softmax.softmax) * splits)


def _written(call: Call, branch: Branch) -> Number:
    """Output and log-sum-exps; of a gate those of each branch, and its gates are read."""
    branches = len(branch.branches) if isinstance(branch, Gate) else 1
    gates = branches * call.shape.size if isinstance(branch, Gate) else 0
    return call.many(call.shape.heads * (call.shape.v * call.shape.size + branches * LSE_BYTES + gates))
