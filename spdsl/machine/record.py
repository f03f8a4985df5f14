"""Noting what a generated module would launch, without a GPU.

A generated module and its library send every kernel through `rt.launch(kernel, grid, *args, num_warps, num_stages,
**constexprs)`, and `rt.launching` says who starts them instead: here nobody, for the time of a call.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

from spdsl.machine.launches import Argument, Launch, specialise

__all__ = ["Argument", "Launch", "library_of", "record", "refuse_interpreter", "specialise"]


def record(module: ModuleType, call: Callable[[], object]) -> list[Launch]:
    """The distinct launches that `call` makes through `module.rt.launch`, in their first order. No kernel runs.

    `call` uses the module's public functions on CPU tensors; strides and sizes decide the specialisation, so they are
    to be those of a real run as far as 1 and multiples of 16 go. Tensors count as allocated at 16-byte addresses.
    RuntimeError under TRITON_INTERPRET (there are no kernels to compile then), or for a module that spdsl did not make.
    """
    refuse_interpreter()
    found: dict[str, Launch] = {}

    def note(kernel: Any, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
        launch = specialise(kernel, args, named)
        found.setdefault(launch.key, launch)

    with library_of(module).launching(note):
        call()
    return list(found.values())


def refuse_interpreter() -> None:
    """RuntimeError when TRITON_INTERPRET is set: interpreted kernels cannot be compiled in the same process."""
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y"):
        raise RuntimeError("cross-compiling needs a process without TRITON_INTERPRET: unset it and start again")


def library_of(module: ModuleType) -> Any:
    """The library that a generated module uses: ours, or a part of it beside it. RuntimeError if it has none."""
    if not hasattr(getattr(module, "rt", None), "launching"):
        raise RuntimeError(f"module {module.__name__} has no library: not made by spdsl")
    return module.rt
