"""What a generated module is to the library: its name and digest, its operators' namespace, its tuner, its launches."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from functools import cache, wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

from spdsl.runtime.launch.eager import eager
from spdsl.runtime.launch.launch import Start, started_by
from spdsl.runtime.tuning.tuner import Tuner
from spdsl.runtime.version import RUNTIME

_Given = ParamSpec("_Given")
_Answer = TypeVar("_Answer")


class Module:
    """One generated module.

    name: its name in sys.modules; its file holds its text. digest: SHA-256 of that text's source, parameters and
    compiler. runtime: the version of the library that it was made for; ImportError if this is another.
    """

    def __init__(self, name: str, pattern: str, params: Mapping[str, float], digest: str, runtime: int) -> None:
        if runtime != RUNTIME:
            raise ImportError(
                f"{name}: pattern {pattern} was made for runtime {runtime}, this is {RUNTIME}: "
                "run `spdsl compile` again, or install the spdsl that made it"
            )
        file = getattr(sys.modules.get(name), "__file__", None)
        self.name, self.pattern, self.params = name, pattern, dict(params)
        self.digest = hashlib.sha256((digest + library_digest()).encode()).hexdigest()
        self.namespace = _free_namespace(f"spdsl_{pattern}_{self.digest}")
        self.tuner = Tuner(file, library_digest())
        self.tuned, self.tune, self.tuning = self.tuner.tuned, self.tuner.tune, self.tuner.tuning
        self.learned: set[str] = set()  # the tensors of its biases that may want a gradient
        self.start: Start | None = None  # what starts its kernels in place of Triton

    def entry(self, function: Callable[_Given, _Answer]) -> Callable[_Given, _Answer]:
        """A function that launches kernels: all of them, the library's too, are started as the module says."""

        @wraps(function)
        def call(*args: _Given.args, **named: _Given.kwargs) -> _Answer:
            if self.start is None:
                return function(*args, **named)
            with started_by(self.start):
                return function(*args, **named)

        return call

    def step(self, function: Callable[_Given, _Answer]) -> Callable[_Given, _Answer]:
        """An entry that reads or writes what a cache or pages hold: torch.compile calls it between its graphs."""
        return eager(self.entry(function))


@cache
def library_digest() -> str:
    """SHA-256 of the library's files: what is kept of its kernels holds for these alone."""
    root = Path(__file__).parent
    found = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        found.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return found.hexdigest()


def _free_namespace(name: str) -> str:
    """Modules that are imported again, or reloaded, get a namespace of their own: operators are not replaced."""
    while True:
        operators = vars(getattr(torch.ops, name))
        if "spdsl_taken" not in operators:
            operators["spdsl_taken"] = True
            return name
        name += "_again"
