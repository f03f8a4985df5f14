"""query_cells: what it costs that queries become other rows, and that what these have is spread over their queries."""

from __future__ import annotations

from spdsl.cost.choose import scoring
from spdsl.cost.kernels import INDEX_BYTES, LSE_BYTES, Call, Kernel
from spdsl.ir.pattern import Phase, Query
from spdsl.ir.plan import ChoicePlan, SoftmaxPlan
from spdsl.ir.schedule import Step


def pooled(call: Call, step: Step[Query]) -> Kernel:
    """All queries, and a row for each cell; the same backward."""
    query = step.of
    if query.tail or call.phase is Phase.DECODE:  # a view; a query is its cell
        return Kernel(step.name, "compress", "copy")
    heads, dim = query.heads or call.shape.heads, query.dim or call.shape.qk
    moved = call.many(heads * (call.queries + call.rows(query.width)) * dim * call.shape.size)
    return Kernel(step.name, "compress", "copy", bytes=moved, moved=moved)


def spread(call: Call, step: Step[SoftmaxPlan] | Step[ChoicePlan]) -> Kernel:
    """Rows are read, and written for each query: lists, or outputs with their log-sum-exps. The same backward."""
    if isinstance(step.of, ChoicePlan):
        choice, softmax = step.of.choice, scoring(call, step.of)
        lists = call.lists(choice, softmax) * (call.queries + call.rows(choice.grain)) * call.capacity(choice)
        moved = call.many(lists * INDEX_BYTES)
        return Kernel(step.name, "select", "copy", bytes=moved, moved=moved)
    softmax, (_, v) = step.of, call.dims(step.of)
    rows = call.count.heads(softmax.softmax) * (call.queries + call.rows(softmax.softmax.rows))
    moved = call.many(rows * (v * call.shape.size + LSE_BYTES))
    return Kernel(step.name, "combine", "copy", bytes=moved, moved=moved)
