"""Compiling what a launcher of somebody else starts, for a GPU that is not there.

Triton gets a driver that names the target and starts nothing; torch says that it has such a GPU. Every launch ends when
its kernel is compiled, so what a launcher computes afterwards is of no meaning.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from spdsl.targets import Target


class CompileOnly(DriverBase):
    """The driver of a GPU that compiles and starts nothing."""

    def __init__(self, target: Target) -> None:
        self.target = target
        properties = {"max_shared_mem": target.shared_per_block, "multiprocessor_count": target.sm_count}
        self.utils = SimpleNamespace(get_device_properties=lambda device: properties)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget(self.target.backend, self.target.arch, self.target.warp_size)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_benchmarker(self) -> Any:
        raise RuntimeError("nothing runs here")


@contextmanager
def captured(target: Target, config: Mapping[str, Any], wanted: Collection[str]) -> Iterator[list[Any]]:
    """The compiled kernels of the wanted names that are launched meanwhile; others are not compiled.

    Of an autotuned kernel the first configuration that has the values of `config` is taken.
    """
    found: list[Any] = []
    run, driver = JITFunction.run, triton.runtime.driver

    def compile_alone(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        if self.fn.__name__ not in wanted:
            return None
        made = run(self, *args, grid=grid, warmup=True, **named)
        found.append(made)
        return made

    def one_configuration(self: Any, *args: Any, **named: Any) -> Any:
        if self.base_fn.__name__ not in wanted:
            return None
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        chosen = next(one for one in self.prune_configs(named) if config.items() <= one.all_kwargs().items())
        if chosen.pre_hook is not None:
            chosen.pre_hook({**self.nargs, **named, **chosen.all_kwargs()})
        return self.fn.run(*args, **named, **chosen.all_kwargs())

    answers = {
        "is_available": lambda: True,
        "current_device": lambda: "cpu",
        "device_count": lambda: 1,
        "get_device_name": lambda *device: target.title,
        "get_device_capability": lambda *device: divmod(int(target.arch), 10),
    }
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(driver, "_active", CompileOnly(target)))
        stack.enter_context(mock.patch.object(JITFunction, "run", compile_alone))
        stack.enter_context(mock.patch.object(Autotuner, "run", one_configuration))
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        yield found
