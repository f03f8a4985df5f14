"""Code that must not wait for the device: its operators, watched."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# Each needs a value on the host; nonzero is also what indexing with a mask does.
_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "repeat_interleave.Tensor")


class NoSync(TorchDispatchMode):
    """AssertionError for an operator whose result, or the size of it, the host has to wait for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        assert not name.startswith(_WAITING), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))
