"""The library that a generated module uses: ours, or that of its own folder."""

from __future__ import annotations

import sys
from types import ModuleType


def home(module: ModuleType, name: str) -> ModuleType:
    """The file of the library in which `rt.name` is defined."""
    return sys.modules[getattr(module.rt, name).__module__]


def launches(module: ModuleType) -> ModuleType:
    """Where it is settled whether CPU tensors take the kernels (KERNELS_ON_CPU, INTERPRETED)."""
    return home(module, "launch")
