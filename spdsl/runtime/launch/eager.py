"""Functions that torch.compile leaves alone: it calls them as they are, between its graphs.

What a cache holds is known in part to the host: tokens that are there for certain change with every step, and a graph
that depended on them would be compiled for each. Kernels are one piece each, so there is nothing for it to fuse.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch

_Given = ParamSpec("_Given")
_Answer = TypeVar("_Answer")

# Once for each function. torch.compiler.disable loads the compiler, which takes seconds: not before one is asked for.
_disabled = cache(torch.compiler.disable)


def eager(function: Callable[_Given, _Answer]) -> Callable[_Given, _Answer]:
    @wraps(function)
    def call(*args: _Given.args, **named: _Given.kwargs) -> _Answer:
        run: Callable[_Given, _Answer] = _disabled(function) if torch.compiler.is_compiling() else function
        return run(*args, **named)

    return call
