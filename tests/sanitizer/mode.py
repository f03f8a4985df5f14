"""A checked mode of interpreted kernels. Within `sanitized()` a launch fails where

- an active lane of a load or store lies outside of the tensors of the launch, as they are given: the gaps of a view
  and the rows that it leaves out are outside;
- a load reads what nobody wrote: memory of torch.empty is poisoned (poison.py);
- a program writes what another program of the launch writes or reads: each sum has one owner;
- a kernel uses an atomic.

Five functions of Triton's interpreter are wrapped. Of the package triton-viz (3.0), whose sanitizer sits on the
interpreter, too, only the first of these could come, and not for our kernels: it looks at arguments that are tensors
themselves, and ours lie in named tuples.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from tests.library import in_library
from tests.sanitizer.launches import Launch
from tests.sanitizer.poison import poison_what_is_allocated
from tests.sanitizer.views import key_of, tensors_of


class Sanitizer:
    """The launch that runs, and the (file, kernel) of those that ran."""

    def __init__(self) -> None:
        self.launch: Launch | None = None
        self.launched: set[tuple[str, str]] = set()

    def kernels(self, file: str) -> set[str]:
        """The kernels of a module, and of its library, that were launched."""
        return {kernel for own, kernel in self.launched if own == file or in_library(own)}


@contextmanager
def sanitized() -> Iterator[Sanitizer]:
    """Needs TRITON_INTERPRET=1. Raises Fault at the first wrong access."""
    found = Sanitizer()
    with pytest.MonkeyPatch.context() as patch:
        poison_what_is_allocated(patch)
        _watch_launches(found, patch)
        _watch_memory(found, patch)
        yield found


def _watch_launches(found: Sanitizer, patch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter

    run, convert = interpreter.GridExecutor.__call__, interpreter._implicit_cvt

    def launched(executor: Any, *args: Any, **kwargs: Any) -> Any:
        file, kernel = executor.fn.__code__.co_filename, executor.fn.__name__
        named = [*zip(executor.arg_names, args, strict=False), *kwargs.items()]
        tensors = [each for name, argument in named for each in tensors_of(name, argument)]
        launch = found.launch = Launch(interpreter.interpreter_builder, kernel, file, tensors)
        found.launched.add((file, kernel))
        try:
            return run(executor, *args, **kwargs)
        except interpreter.InterpreterError:
            if launch.fault is not None:  # the interpreter wraps what a kernel raises, once for each call in it
                raise launch.fault from None
            raise
        finally:
            found.launch = None

    def converted(argument: Any) -> Any:
        """As Triton does it, but that a tensor is where its window is."""
        value = convert(argument)
        if found.launch is not None and hasattr(argument, "data_ptr"):
            value.handle.data = np.array([found.launch.views[key_of(argument)].base], dtype=np.uint64)
        return value

    patch.setattr(interpreter.GridExecutor, "__call__", launched)
    patch.setattr(interpreter, "_implicit_cvt", converted)


def _watch_memory(found: Sanitizer, patch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpreterBuilder as Builder
    from triton.runtime.interpreter import TensorHandle

    load, store = Builder.create_masked_load, Builder.create_masked_store

    def real(pointers: Any, accesses: list[Any]) -> Any:
        """The same lanes where their memory is; lanes that are not active are nowhere."""
        data = np.zeros(pointers.data.shape, dtype=np.uint64)
        for access in accesses:
            data.ravel()[access.lanes] = access.byte + access.view.memory
        return TensorHandle(data, pointers.dtype)

    def loaded(builder: Any, pointers: Any, mask: Any, *how: Any, **named: Any) -> Any:
        assert found.launch is not None
        accesses = found.launch.accesses("load", pointers.data, mask.data)
        value = load(builder, real(pointers, accesses), mask, *how, **named)
        for access in accesses:
            found.launch.read(access, value.data.ravel()[access.lanes])
        return value

    def stored(builder: Any, pointers: Any, value: Any, mask: Any, *how: Any, **named: Any) -> Any:
        assert found.launch is not None
        accesses = found.launch.accesses("store", pointers.data, mask.data)
        for access in accesses:
            found.launch.write(access)
        return store(builder, real(pointers, accesses), value, mask, *how, **named)

    def refused(*_: Any, **__: Any) -> Any:
        assert found.launch is not None
        found.launch.refuse_atomic()

    patch.setattr(Builder, "create_masked_load", loaded)
    patch.setattr(Builder, "create_masked_store", stored)
    patch.setattr(Builder, "create_atomic_rmw", refused)
    patch.setattr(Builder, "create_atomic_cas", refused)
