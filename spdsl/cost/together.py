"""together: how the branches of a result become one, and which result answers."""

from __future__ import annotations

from collections.abc import Iterator

from spdsl.cost.kernels import LSE_BYTES, NONE, Call, Kernel
from spdsl.ir.pattern import Branch, Gate, Merge, Phase, Values
from spdsl.passes.count import Number
from spdsl.passes.joint import leaves

# Operators of torch, as the tests count them in generated modules.
LSE_STEPS = 1  # one lse per branch, beside each other
MERGE_STEPS = 24  # of two branches
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
        elif isinstance(branch, Merge):
            yield _sums(call, branch)


def _sums(call: Call, branch: Branch) -> Kernel:
    """Gradients that several parts of a joint have are added up; that of an lse, which each part counts, is one."""
    plans = [one for one in call.softmaxes if one.name in leaves(branch)]
    found, again, steps = set(), NONE, 1 - len(plans)
    for one in plans:
        qk, _ = call.dims(one)
        query = one.softmax.query
        if query in found:
            again, steps = again + call.rows_bytes(one, qk) * 3, steps + 1
        found.add(query)
        for sweep in one.sweeps:
            stream = sweep.stream
            if stream.name in found:
                heads, keys_qk, keys_v = call.count.stream(stream)
                sides = keys_qk + (keys_v if stream.value is Values.OWN else 0)
                again += call.many(3 * heads * call.count.entries(stream) * sides * call.shape.size)
                steps += 1 + (stream.value is Values.OWN)
            found.add(stream.name)
    return Kernel("sums of parts", "combine", "copy", 0, steps, bytes=again, moved=again)


def _joint(call: Call, branch: Branch) -> bool:
    return leaves(branch) in {one.parts for one in call.plan.joints}


def _branches(call: Call) -> Iterator[Branch]:
    """What is put together, from the inside out; with a cache every case is computed."""
    cases = [call.count.case(call.phase)] if call.phase is Phase.TRAIN else call.plan.pattern.cases_of(call.phase)
    for case in cases:
        if isinstance(case.branch, Gate):
            yield from case.branch.branches
        yield case.branch


def _bytes(call: Call, branch: Branch) -> Number:
    parts = len(branch.branches) if isinstance(branch, Gate | Merge) else 1
    heads, v = call.shape.heads, call.shape.v
    return call.many(call.queries * heads * ((parts + 1) * v * call.shape.size + parts * LSE_BYTES))
