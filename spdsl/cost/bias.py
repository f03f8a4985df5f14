"""bias: the gradients of what a bias reads: the products of a backward without those of its vectors."""

from __future__ import annotations

from dataclasses import replace

from spdsl.cost import attend, pairs, units
from spdsl.cost.kernels import Call, Kernel
from spdsl.cost.pair_products import of_algorithm, of_tiles
from spdsl.ir.plan import SoftmaxPlan
from spdsl.ir.schedule import Kind, Step
from spdsl.passes.count import Number


def gradient(call: Call, step: Step[SoftmaxPlan]) -> Kernel:
    """Scores and dP, of each tile that the backward visits: two of the three products of dQ, of the four of dK/dV."""
    softmax = step.of
    (qk, v), (wide_qk, wide_v) = call.dims(softmax), call.tile_dims(softmax)
    work = units.dq if softmax.units is not None else attend.dkdv if step.table == "dkdv" else attend.dq
    own = (pairs.dq if softmax.pairs else work)(call, step)
    whole = of_tiles(Kind.DKDV if step.table == "dkdv" else Kind.DQ, wide_qk, wide_v)
    tiles = Number(own.machine.value // whole, own.machine.exact)
    first = step.index == 0
    flops = call.pairs(softmax) * (2 * of_algorithm(Kind.DKDV, qk, v) * call.shape.batch * first)
    return replace(own, flops=flops, machine=tiles * of_tiles(Kind.FORWARD, wide_qk, wide_v))


def sums(call: Call, step: Step[SoftmaxPlan]) -> Kernel:
    """One number for each program, row or key: small beside the tiles that they are of."""
    return Kernel(step.name, "backward", "copy")
