"""triton and triton.language; or stand-ins where triton is not installed.

Then kernels are defined and never launched: CPU tensors take the torch path.
"""

from __future__ import annotations

from types import SimpleNamespace

__all__ = ["tl", "triton"]

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:
    triton = SimpleNamespace(
        jit=lambda f: f,
        knobs=SimpleNamespace(runtime=SimpleNamespace(interpret=False)),
        __version__="none",
    )
    tl = SimpleNamespace(constexpr=lambda x: x)
