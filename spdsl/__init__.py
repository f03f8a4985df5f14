"""spdsl: a compiler for sparse attention.

>>> import spdsl
>>> m = spdsl.load("patterns/streaming_llm.spat", window=512)  # doctest: +SKIP
>>> out = m.attention(q, k, v)                                  # doctest: +SKIP
"""

from __future__ import annotations

from spdsl.diagnostics import Diagnostic, SpatError
from spdsl.version import __version__

__all__ = ["Diagnostic", "SpatError", "__version__", "check", "compile", "load"]


_LATE = frozenset({"compile", "check", "load"})


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> object:
    """`compile`, `check` and `load` come from `spdsl.api`, which imports sympy: only when first used."""
    if name in _LATE:
        from spdsl import api

        return getattr(api, name)
    raise AttributeError(f"module 'spdsl' has no attribute {name!r}")
