"""Which share of the visited blocks is masked, by the ranges that a module computes for its tiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

from spdsl.cost.attend import config_of, walked
from spdsl.cost.kernels import Call
from spdsl.ir.plan import SoftmaxPlan
from spdsl.ir.schedule import Step

Visits = Callable[[int, int, int], Sequence[tuple[int, int, int, int]]]


def masked(call: Call, step: Step[SoftmaxPlan], module: ModuleType) -> float:
    """Of a kernel over ranges, and of dK and dV, whose blocks are those of the forward turned around.

    0 where tensors decide: then nothing is known, and the loop without masks stands for both.
    """
    own, config = walked(call, step.of), config_of(call, step)
    sweep = getattr(module, f"{own.name}_form").sweeps[step.index]
    if sweep.visits is None:
        return 0.0
    classes = next((one.step for one in call.softmaxes if one.of_class == own), 1)
    tokens = -(-call.length // classes)
    keys = call.count.entries(own.sweeps[step.index].stream, tokens)
    return masked_share(sweep.visits, tokens, keys, config.block_m, config.block_n)


def masked_share(visits: Visits, tokens: int, keys: int, rows: int, block: int) -> float:
    """Masked blocks over all that tiles of `rows` queries visit."""
    every = partial = 0
    for first in range(0, tokens, rows):
        last = min(first + rows, tokens) - 1
        visited, full = _blocks(visits(first, last, tokens), keys, block)
        every += visited
        partial += visited - full
    return partial / every if every else 0.0


def _blocks(ranges: Sequence[tuple[int, int, int, int]], keys: int, block: int) -> tuple[int, int]:
    """Visited and full blocks of one tile. As in the kernels a block that one range has taken is taken."""
    cursor = visited = full = 0
    for first, end, full_first, full_end in ranges:
        first, end = max(0, first), min(end, keys)
        if first >= end:
            continue
        begin, stop = max(first // block, cursor), max(-(-end // block), cursor)
        whole = range(max(-(-max(0, full_first) // block), begin), min(max(0, min(full_end, keys)) // block, stop))
        visited, full, cursor = visited + stop - begin, full + len(whole), stop
    return visited, full
