"""Noting what a generated module would launch, without a GPU.

A generated module sends every kernel through its function `launch(kernel, grid, *args, num_warps, num_stages,
**constexprs)`. Here that function is replaced for the time of a call, so nothing runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from spdsl.runtime.launches import Argument, Launch, specialise

__all__ = ["Argument", "Launch", "record", "refuse_interpreter", "specialise"]


def record(module: ModuleType, call: Callable[[], object]) -> list[Launch]:
    """The distinct launches that `call` makes through `module.launch`, in their first order. No kernel runs.

    `call` uses the module's public functions on CPU tensors; strides and sizes decide the specialisation, so they are
    to be those of a real run as far as 1 and multiples of 16 go. Tensors count as allocated at 16-byte addresses.
    RuntimeError under TRITON_INTERPRET (there are no kernels to compile then), or when the module has no `launch`.
    """
    refuse_interpreter()
    found: dict[str, Launch] = {}

    def note(kernel: Any, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
        if min(grid) > 0:  # an empty grid is no launch
            launch = specialise(kernel, args, named)
            found.setdefault(launch.key, launch)

    with replaced(module, launch=note, KERNELS_ON_CPU=True):
        call()
    return list(found.values())


def refuse_interpreter() -> None:
    """RuntimeError when TRITON_INTERPRET is set: interpreted kernels cannot be compiled in the same process."""
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y"):
        raise RuntimeError("cross-compiling needs a process without TRITON_INTERPRET: unset it and start again")


@contextmanager
def replaced(module: ModuleType, **attributes: object) -> Iterator[None]:
    missing = [name for name in attributes if not hasattr(module, name)]
    if missing:
        raise RuntimeError(f"module {module.__name__} has no {' and no '.join(missing)}: not made by spdsl")
    before = {name: getattr(module, name) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
