"""spdsl: a compiler for sparse attention.

>>> import spdsl
>>> m = spdsl.load("patterns/streaming_llm.spat", window=512)  # doctest: +SKIP
>>> out = m.attention(q, k, v)                                  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from spdsl.version import __version__

if TYPE_CHECKING:
    from spdsl.diagnostics import Diagnostic, SpatError

__all__ = ["Diagnostic", "SpatError", "__version__", "check", "compile", "diagnose", "load"]

# `spdsl.api` imports sympy, and generated modules import this package: so these come when they are first used.
_LATE = {
    "Diagnostic": "spdsl.diagnostics", "SpatError": "spdsl.diagnostics",
    "check": "spdsl.api", "compile": "spdsl.api", "load": "spdsl.api",
    "diagnose": "spdsl.diagnosis",
}  # fmt: skip


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> object:
    if name in _LATE:
        return getattr(import_module(_LATE[name]), name)
    raise AttributeError(f"module 'spdsl' has no attribute {name!r}")
