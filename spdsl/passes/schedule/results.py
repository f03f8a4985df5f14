"""results: the steps by which parts become a result, which result answers, and the same backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from spdsl.ir.pattern import Branch, Case, Gate, Merge, Softmax
from spdsl.ir.plan import Joint, SoftmaxPlan
from spdsl.ir.schedule import Buffer, Event, Kind, Lifetime, Stage, Step
from spdsl.ir.visit import TILE
from spdsl.passes.joint import leaves
from spdsl.passes.schedule import query_cells
from spdsl.passes.schedule.buffers import LIKE_Q, Buffers

ROWS, PARTS = str(TILE), "the parts"


def combined(room: Buffers, result: Branch) -> Iterator[Step[Branch] | Step[SoftmaxPlan]]:
    """How the parts of a result become one. In training joints come merged already."""
    if room.stage is Stage.DECODE:
        yield _joined(room, result)
        return
    yield from query_cells.spread(room, result)
    for branch in result.branches if isinstance(result, Gate) else (result,):
        if isinstance(branch, Merge) and not (room.stage is Stage.FORWARD and is_joint(room, branch)):
            yield merged(room, branch)
    if isinstance(result, Gate):
        event = Event.ATTENDED if room.cached else Event.CALLED
        parts, out = _parts(room, result), _written(room, result)
        outs, lses = parts[::2], parts[1::2]
        yield Step(
            Kind.GATE, "gate_rows", result, "gate_rows", ROWS, PARTS, (*outs, _gates(room, result)), out[:1],
            event=event,
        )  # fmt: skip
        yield Step(Kind.LSES, "lse of each branch", result, reads=lses, writes=out[1:], event=event)


def uncombined(room: Buffers, result: Branch) -> Iterator[Step[Branch] | Step[SoftmaxPlan]]:
    """The gradients of the parts of a result; those of a joint are shares that its backward computes."""
    if isinstance(result, Gate):
        gradient = room.gradients(_written(room, result)[:1])
        outs = _parts(room, result)[::2]
        yield Step(
            Kind.GATE_BACK, "gate_gradients", result, "gate_gradients", ROWS, PARTS,
            (*gradient, *outs, _gates(room, result)), room.gradients((*outs, _gates(room, result))),
        )  # fmt: skip
    for branch in reversed(result.branches if isinstance(result, Gate) else (result,)):
        if isinstance(branch, Merge) and not is_joint(room, branch):
            yield Step(Kind.MERGE_BACK, "merge, backward", branch, writes=room.gradients(_parts(room, branch)))
    yield from query_cells.gathered(room, result)


def merged(room: Buffers, branch: Branch) -> Step[Branch]:
    """One softmax of parts over disjoint keys: by a kernel where autograd does not look in."""
    event = Event.ATTENDED if room.cached else Event.CALLED
    parts, out = _parts(room, branch), _written(room, branch)
    if room.stage is Stage.FORWARD and not is_joint(room, branch):
        return Step(Kind.MERGE_BY_TORCH, "merge", branch, reads=parts, writes=out)
    return Step(Kind.MERGE, "merge_rows", branch, "merge_rows", ROWS, PARTS, parts, out, event=event)


def is_joint(room: Buffers, branch: Branch) -> bool:
    return leaves(branch) in {one.parts for one in room.plan.joints}


def holds(room: Buffers, case: Case) -> Iterator[Step[Case]]:
    """With a cache only the device knows lengths: conditions are tensors, and every case is computed."""
    if case.condition is not None and room.cached:
        condition = room.made("condition", ("B",), "bool")
        yield Step(Kind.HOLDS, "condition of a result", case, writes=(condition,))


def settled(room: Buffers, cases: Sequence[Case]) -> Iterator[Step[tuple[Case, ...]]]:
    """For each sequence the first result whose condition holds."""
    conditions = tuple(one for one in cases if one.condition is not None)
    if conditions and room.cached:
        reads = tuple(one for case in cases for one in _written(room, case.branch))
        out = room.result("result")
        yield Step(Kind.SETTLE, "choice of results", conditions, reads=reads, writes=out, event=Event.ATTENDED)


def joined(room: Buffers, joint: Joint) -> Step[Joint]:
    """The parts of a joint as one softmax, within its operator."""
    parts = tuple(one for name in joint.parts for one in room.result(name))
    return Step(Kind.MERGE, "merge_rows", joint, "merge_rows", ROWS, PARTS, parts, room.result(joint.name))


def _joined(room: Buffers, result: Branch) -> Step[Branch]:
    """All that becomes one goes to one launch: splits, parts of a merge, branches of a gate."""
    plans = {one.name: one for one in room.plan.softmaxes}
    reads = tuple(split for name in leaves(result) for split in room.splits(plans[name]))
    gates = (_gates(room, result),) if isinstance(result, Gate) else ()
    return Step(
        Kind.JOIN, "join_splits", result, "join_splits", "a head of a sequence", "the splits of all parts",
        (*reads, *gates), _written(room, result), event=Event.ATTENDED,
    )  # fmt: skip


def _parts(room: Buffers, branch: Branch) -> tuple[Buffer, ...]:
    if isinstance(branch, Gate):
        return tuple(one for inner in branch.branches for one in _written(room, inner))
    return tuple(one for name in leaves(branch) for one in room.of_queries(name))


def _written(room: Buffers, branch: Branch) -> tuple[Buffer, Buffer]:
    """out and lse, by the softmaxes that they are made of; a joint is written by itself."""
    joints = {} if room.cached else {one.parts: one.name for one in room.plan.joints}
    if isinstance(branch, Softmax):
        return room.of_queries(branch.name)
    if isinstance(branch, Gate):
        return room.result("gated", len(branch.branches))
    return room.result(joints.get(tuple(leaves(branch)), "+".join(leaves(branch))))


def _gates(room: Buffers, gate: Gate) -> Buffer:
    lse = room.result("gates", len(gate.branches))[1]
    return replace(lse, name="gates", dtype=LIKE_Q, lifetime=Lifetime.CALLER)
