"""join: the merge of what the kernels of a decode step leave: one launch for each result."""

from __future__ import annotations

from collections.abc import Iterator

from spdsl.cost import attend, chosen
from spdsl.cost.kernels import LSE_BYTES, Call, Kernel
from spdsl.ir.pattern import Branch, Gate
from spdsl.ir.plan import SoftmaxPlan
from spdsl.passes.count import Number
from spdsl.passes.joint import leaves


def results(call: Call) -> Iterator[Kernel]:
    """With a cache every case is computed. Splits are float32, and read once."""
    cases = call.plan.pattern.cases_of(call.phase)
    for result in (one for case in cases for one in (case.branch, *case.extras) if isinstance(one, Branch)):
        found = _written(call, result)
        for softmax in (one for one in call.softmaxes if one.name in leaves(result)):
            _, v = call.dims(softmax)
            found += _splits(call, softmax) * ((v + 1) * LSE_BYTES)
        yield Kernel("join_splits", "combine", "copy", bytes=found, moved=found)


def _splits(call: Call, softmax: SoftmaxPlan) -> Number:
    """Of all heads."""
    splits = (attend.splits if softmax.units is None else chosen.splits)(call, softmax)
    return call.many(call.count.heads(softmax.softmax) * splits)


def _written(call: Call, branch: Branch) -> Number:
    """Output and log-sum-exps; of a gate those of each branch, and its gates are read."""
    branches = len(branch.branches) if isinstance(branch, Gate) else 1
    gates = branches * call.shape.size if isinstance(branch, Gate) else 0
    return call.many(call.shape.heads * (call.shape.v * call.shape.size + branches * LSE_BYTES + gates))
