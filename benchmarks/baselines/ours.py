"""The module that spdsl generates from the pattern."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import spdsl
from benchmarks.baselines import Attend
from benchmarks.workload import Workload

Visits = Callable[[int, int], list[tuple[int, int, bool]]]


def prepare(workload: Workload, tokens: int) -> Attend:
    module = spdsl.load(workload.pattern, sinks=workload.sinks, window=workload.window)
    attend: Attend = module.attention
    return attend


def visits(workload: Workload, tokens: int) -> Visits:
    """The generated module's visits: rows [first, end) -> key ranges (first, end, full)."""
    module = spdsl.load(workload.pattern, sinks=workload.sinks, window=workload.window)
    return partial(module.visits, tokens=tokens)
