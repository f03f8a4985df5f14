"""Steps that wait for nothing: within `no_host_reads()` whatever needs a number of the device on the host is refused.

The numbers of a kernel are its own affair: the interpreter reads them, so all is allowed while a kernel runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Operators whose result, or the size of it, the host has to know.
_WAITING = re.compile(
    r"_local_scalar_dense|nonzero|nonzero_numpy|masked_select|_?unique.*|equal|allclose|is_nonzero|bincount"
)
_INDEXING = ("index", "index_put", "index_put_", "_unsafe_index", "_unsafe_index_put", "_index_put_impl_")
_COPYING = ("_to_copy", "copy", "copy_", "_copy_from", "_copy_from_and_resize")
_METHODS = ("numpy", "tolist", "untyped_storage")  # these pass no dispatcher


class HostRead(AssertionError):
    """A step asked for a number that only the device has."""


class _Mode(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.in_kernel = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.in_kernel and (wrong := _wrong(func, args, kwargs)):
            raise HostRead(f"{func}: {wrong}")
        return func(*args, **kwargs)


def _wrong(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    name = func.overloadpacket.__name__
    if func.namespace.startswith("spdsl_"):
        return "an operator of the module hides what it calls"
    if _WAITING.fullmatch(name):
        return "the host waits for its result"
    if name in _INDEXING and any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
        return "the host waits for the number of elements that a mask selects"
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        return "the host waits for the sum of the repeats"
    if name in _COPYING:
        devices = {x.device for x in args if isinstance(x, Tensor)}
        devices |= {torch.device(kwargs["device"])} if kwargs.get("device") is not None else set()
        if len(devices) > 1:
            return f"a copy between devices, {' and '.join(sorted(map(str, devices)))}"
    return None


@contextmanager
def no_host_reads() -> Iterator[None]:
    """Needs TRITON_INTERPRET=1. Raises HostRead where a step reads what the host does not know."""
    from triton.runtime import interpreter

    mode, run = _Mode(), interpreter.GridExecutor.__call__

    def launched(executor: Any, *args: Any, **kwargs: Any) -> Any:
        mode.in_kernel = True
        try:
            return run(executor, *args, **kwargs)
        finally:
            mode.in_kernel = False

    def refusing(name: str) -> Callable[..., Any]:
        method = getattr(Tensor, name)

        def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not mode.in_kernel:
                raise HostRead(f"Tensor.{name} reads a tensor on the host")
            return method(x, *args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", launched)
        for name in _METHODS:
            patch.setattr(Tensor, name, refusing(name))
        with mode:
            yield
