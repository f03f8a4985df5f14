"""Triton's interpreter, without a repetition that takes most of its time.

It replaces the functions of triton.language by its own before a kernel and again before every call of a device
function, of which a kernel makes thousands; each time it looks at all names of the language. Once for each kernel and
each module whose functions it calls is enough, since nothing is put back before the kernel ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def replace_once_per_kernel() -> None:
    """Changes Triton in this process; without Triton nothing."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    replace, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done: set[int] = set()

    def once(fn: Callable[..., Any]) -> Any:
        if id(fn.__globals__) in done:
            return None
        done.add(id(fn.__globals__))
        return replace(fn)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        done.clear()
        return run(*args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = once, kernel
