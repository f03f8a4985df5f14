"""What a case of a peer is: one kernel, the call of a launcher that starts it, and the kernel of ours beside it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.static.code import Code

HEADS, KV_HEADS, BLOCK, COUNT, WINDOW, WIDTH, STRIDE = 64, 4, 64, 16, 512, 32, 16
TOKENS = 1024  # of the tensors that launchers get; nothing is computed with them
ENTRIES = (TOKENS - WIDTH) // STRIDE + 1
PAPER, EQUAL = (192, 128), (128, 128)
PATTERNS = {PAPER: "nsa", EQUAL: "nsa 128"}


@dataclass(frozen=True)
class Case:
    """One kernel of a peer."""

    kernel: str
    """Its name there."""
    beside: str
    """The kernel of ours that does the same."""
    dims: tuple[int, int]
    per_pair: int
    """Multiplications of its program for each pair, with the dims that it pads to."""
    launch: Callable[[], object]
    gathers: bool = False
    """Its rows are one query, or queries that chose the same unit: no pair of a unit is wasted."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Which of the configurations of an autotuner is taken: it would take the fastest."""
    pairs: int = 0
    """Of an iteration, where only some of its loops are meant: the others have other products."""
    pattern: str = ""
    dtype: str = "bf16"
    heads: tuple[int, int] = (HEADS, KV_HEADS)

    @property
    def ours(self) -> str:
        return self.pattern or PATTERNS[self.dims]

    def own(self, code: Code) -> Code:
        """With the loops that are meant."""
        meant = tuple(loop for loop in code.loops if loop.wanted == self.pairs * self.per_pair)
        return replace(code, loops=meant) if self.pairs else code


def bare(name: str, path: Path) -> None:
    """A package whose `__init__` is not run: it would import what its kernels do not need."""
    package = ModuleType(name)
    package.__path__ = [str(path)]
    package.__version__ = "unknown"  # type: ignore[attr-defined]
    sys.modules[name] = package


def absent(name: str, *functions: str) -> None:
    """A package that is imported and not used; only where it is not installed."""
    if importlib.util.find_spec(name) is None:
        package = ModuleType(name)
        for function in functions:
            setattr(package, function, None)
        sys.modules[name] = package


def rows(heads: int, dim: int, tokens: int = TOKENS) -> Tensor:
    """[tokens, heads, dim]"""
    return torch.zeros(tokens, heads, dim, dtype=torch.bfloat16)


def ends(tokens: int = TOKENS) -> Tensor:
    """Cumulative lengths of one sequence."""
    return torch.tensor([0, tokens], dtype=torch.int32)
