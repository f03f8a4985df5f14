"""What a call needs to know about the pattern before it can compute, at a length where masks no longer fit.

`prepare_s` is the plan proper: checks, layout and inputs, after which a kernel can be launched. Nothing is stored: a
tile derives its key ranges from its rows when its turn comes. `first_s` and `again_s` are the time from a call of
`attention` on CPU tensors to its first tile, dispatch and the allocation of the outputs included, cold and warm.
`steady_s` is the walk: the key ranges of all tiles of the CPU path, which on a GPU every program derives itself.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

from benchmarks.baselines import ours
from benchmarks.workload import Workload

REPEATS = 20


class Started(Exception):
    """The first tile is about to be computed."""


def plan(work: Workload, tokens: int) -> dict[str, Any]:
    module = ours.module(work)
    starts = [before_first_tile(module, tokens) for _ in range(REPEATS)]
    walks = [walk(module, tokens) for _ in range(3)]
    return {
        "prepare_s": statistics.median(prepared(module, tokens) for _ in range(REPEATS)),
        "first_s": starts[0],
        "again_s": statistics.median(starts[1:]),
        "steady_s": min(seconds for seconds, _, _ in walks),
        "tiles": walks[0][1],
        "most_keys": walks[0][2],
    }


def before_first_tile(module: ModuleType, tokens: int) -> float:
    """Seconds from the call of `attention` to the first engine call. One head of dim 1: the tensors must not count."""
    import torch

    q, k, v = (torch.zeros(1, 1, tokens, 1) for _ in range(3))
    begun: list[float] = []
    with stopped(module, begun):
        start = time.perf_counter()
        try:
            with torch.no_grad():
                module.attention(q, k, v)
        except Started:
            pass
    return begun[0] - start


def prepared(module: ModuleType, tokens: int) -> float:
    """Seconds for checks, layout and inputs, as `attention` makes them."""
    import torch

    q, k, v = (torch.zeros(1, 1, tokens, 1) for _ in range(3))
    start = time.perf_counter()
    inputs = module.rt.checked(module.ARGUMENTS, module.Inputs(q, k, v), "train")
    layout = module.rt.checked_layout(q, k, module.rt.Options())
    module.rt.prepared(module.ARGUMENTS, inputs, layout)
    return time.perf_counter() - start


@contextmanager
def stopped(module: ModuleType, begun: list[float]) -> Iterator[None]:
    """The CPU path up to its engine: notes the time there and ends the call."""

    def stop(*args: Any, **named: Any) -> None:
        begun.append(time.perf_counter())
        raise Started

    from spdsl.runtime.cpu import attention

    with mock.patch.object(attention, "sparse_forward", stop):
        yield


def walk(module: ModuleType, tokens: int) -> tuple[float, int, int]:
    """Seconds for the key ranges of all tiles of the CPU path, how many tiles, the most keys that one visits."""
    from spdsl.runtime.cpu.cpu_tiles import _TILE_ROWS as rows

    start = time.perf_counter()
    found = [module.attend_visits(q, min(q + rows, tokens) - 1, tokens) for q in range(0, tokens, rows)]
    seconds = time.perf_counter() - start
    return seconds, len(found), max(sum(end - first for first, end, _, _ in ranges) for ranges in found)
