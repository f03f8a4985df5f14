"""What a generated module really starts in each phase: kernels by name, and torch operators that do work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from spdsl.machine import survey
from spdsl.runtime.tuning.trials import tensors_of
from tests.library import home

QUIET = ("empty", "detach", "alias", "is_pinned", "_local_scalar", "lift", "sym_", "prim", "scalar_tensor")


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
    """A custom operator hides what it calls from a dispatch mode: what it does enters the mode again."""
    library = home(module, "Module")
    started_by = library.started_by

    @contextmanager
    def entering(start: Any) -> Iterator[None]:
        with started_by(start):
            if _get_current_dispatch_mode() is steps:
                yield
            else:
                with steps:
                    yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "started_by", entering)
        patch.setattr(module.MODULE, "start", module.rt.with_triton)  # which `launching` hides
        yield


def started(module: ModuleType, phase: str, tokens: int, sizes: Any, learned: bool = False) -> Started:
    found: list[str] = []

    def note(kernel: Any, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
        found.append(kernel.fn.__name__)

    ahead, back = Steps(), Steps()
    with module.rt.launching(note):
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
        for name in module.MODULE.learned if learned else ():
            inputs[name].requires_grad_()
        with _seen_within_operators(module, ahead), ahead:
            outputs = [x for x in tensors_of(module.attention(**inputs)) if x.requires_grad]
        kernels = list(found)
        found.clear()
        given = [torch.ones_like(x) for x in outputs]
        with _seen_within_operators(module, back), back:
            torch.autograd.backward(outputs, given)
        return Started(kernels, ahead.found, list(found), back.found)
