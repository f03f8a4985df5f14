"""One module per contender: `prepare(workload, tokens)` does what comes before the first call and returns the call."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

from benchmarks.workload import Workload

if TYPE_CHECKING:
    from torch import Tensor

Attend = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]
NAMES = ("ours", "sdpa", "flex")


def prepare(name: str, workload: Workload, tokens: int) -> Attend:
    """Imports the contender only here: importing one must not cost another time or memory."""
    if name not in NAMES:
        raise ValueError(f"unknown contender {name!r}: one of {', '.join(NAMES)}")
    found: Attend = import_module(f"benchmarks.baselines.{name}").prepare(workload, tokens)
    return found
