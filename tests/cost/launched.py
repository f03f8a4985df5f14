"""What a generated module really starts in each phase: kernels by name, and torch operators that do work."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from spdsl.machine import survey
from spdsl.machine.record import replaced
from spdsl.runtime.tuning.trials import tensors_of

QUIET = ("empty", "detach", "alias", "is_pinned", "_local_scalar", "lift", "sym_", "prim", "scalar_tensor")
LAUNCHING = re.compile(
    r".*(_kernel_(forward|backward|decode)|_kernel)|(gate|entries)_(forward|backward)|.*_backward_of"
)


class Steps(TorchDispatchMode):
    """Counts operators that are no views and no bare allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        view = any(ret.alias_info is not None and not ret.alias_info.is_write for ret in func._schema.returns)
        if not view and not any(word in name for word in QUIET) and not func.namespace.startswith("spdsl_"):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class Started(NamedTuple):
    """Names of kernels in order, and torch operators, of a call and of its backward."""

    kernels: list[str]
    steps: Counter[str]
    back_kernels: list[str]
    back_steps: Counter[str]


@contextmanager
def _seen_within_operators(module: ModuleType, steps: Steps) -> Iterator[None]:
    """A custom operator hides what it calls from a dispatch mode: its launching function enters the mode again."""

    def entering(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            if _get_current_dispatch_mode() is steps:
                return function(*args, **named)
            with steps:
                return function(*args, **named)

        return call

    own = {name: value for name, value in vars(module).items() if callable(value) and LAUNCHING.fullmatch(name)}
    with replaced(module, **{name: entering(value) for name, value in own.items()}):
        yield


def started(module: ModuleType, phase: str, tokens: int, sizes: Any) -> Started:
    found: list[str] = []

    def note(kernel: Any, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
        if min(grid) > 0:
            found.append(kernel.fn.__name__)

    ahead, back = Steps(), Steps()
    with replaced(module, launch=note, KERNELS_ON_CPU=True):
        inputs = survey._inputs(module, 1 if phase == "decode" else tokens, sizes)
        if phase != "train":
            dims = {"kv_heads": sizes.kv_heads, "qk_dim": sizes.qk_dim, "v_dim": sizes.v_dim}
            cache = module.Cache(survey.BATCH, tokens, **dims, dtype=sizes.dtype, device="cpu")
            with ahead:
                getattr(module, phase)(**inputs, cache=cache)
            return Started(list(found), ahead.found, [], Counter())
        for x in inputs.values():
            if x.is_floating_point() and x.dim() == 4:
                x.requires_grad_()
        with _seen_within_operators(module, ahead), ahead:
            outputs = [x for x in tensors_of(module.attention(**inputs)) if x.requires_grad]
        kernels = list(found)
        found.clear()
        given = [torch.ones_like(x) for x in outputs]
        with _seen_within_operators(module, back), back:
            torch.autograd.backward(outputs, given)
        return Started(kernels, ahead.found, list(found), back.found)
