"""The module that spdsl generates from the pattern."""

from __future__ import annotations

from types import ModuleType

import spdsl
from benchmarks.baselines import Attend
from benchmarks.workload import Workload


def prepare(workload: Workload, tokens: int) -> Attend:
    attend: Attend = module(workload).attention
    return attend


def module(workload: Workload) -> ModuleType:
    return spdsl.load(workload.pattern, sinks=workload.sinks, window=workload.window)
