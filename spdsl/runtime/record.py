"""Noting what a generated module would launch, without a GPU.

A generated module sends every kernel through its function `launch(kernel, grid, *args, num_warps, num_stages,
**constexprs)`. Here that function is replaced for the time of a call, so nothing runs; what is kept of each launch is
what Triton specialises a kernel on (triton 3.6 to 3.9, `JITFunction.run`): types, the constexprs, which integers are 1,
which integers and pointers are multiples of 16, which arguments are None, which tensors stay below 2 GB.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

ALIGNMENT = 16  # Triton knows one divisibility, 16, for integers and for the bytes of an address
POINTER_RANGE = 2**31 - 1  # largest size in bytes that the AMD backend reaches by 32-bit offsets

_POINTEE = {
    torch.bool: "u1",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
    torch.float8_e4m3fnuz: "fp8e4b8",
    torch.float8_e5m2fnuz: "fp8e5b16",
}


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument as Triton sees it: a type as in a signature (`*bf16`, `i32`, `constexpr`), and what is known."""

    name: str
    type: str
    divisible: bool = False
    """A multiple of 16: the integer, or the address in bytes."""
    within_2gb: bool = False
    value: Any = None
    """Of a constexpr only, which is also what an integer 1 and a None become."""


@dataclass(frozen=True)
class Launch:
    """One kernel with one specialisation: all that a compiler needs, and no tensor."""

    name: str
    arguments: tuple[Argument, ...]
    options: tuple[tuple[str, Any], ...]
    """`num_warps`, `num_stages` and whatever else was given that the kernel has no parameter for, sorted."""
    kernel: Any = field(repr=False)

    @property
    def key(self) -> str:
        """Equal for two launches that share a compiled kernel."""
        return repr((self.name, self.arguments, self.options, id(self.kernel)))

    @property
    def constexprs(self) -> dict[str, Any]:
        return {a.name: a.value for a in self.arguments if a.type == "constexpr"}

    def attributes(self, backend: str) -> dict[tuple[int], list[list[Any]]]:
        """The attributes of `ASTSource`, by position; `backend` is `cuda` or `hip`."""
        found = {}
        for position, argument in enumerate(self.arguments):
            known: list[list[Any]] = [["tt.divisibility", ALIGNMENT]] if argument.divisible else []
            if backend == "hip" and argument.within_2gb:
                known.append(["tt.pointer_range", 32])
            if known:
                found[(position,)] = known
        return found

    def source(self, backend: str) -> ASTSource:
        """What `triton.compile` takes, the same as a launch on that backend would give it."""
        signature = {a.name: a.type for a in self.arguments}
        constexprs = {(i,): a.value for i, a in enumerate(self.arguments) if a.type == "constexpr"}
        return ASTSource(self.kernel, signature, constexprs, self.attributes(backend))


def record(module: ModuleType, call: Callable[[], object]) -> list[Launch]:
    """The distinct launches that `call` makes through `module.launch`, in their first order. No kernel runs.

    `call` uses the module's public functions on CPU tensors; strides and sizes decide the specialisation, so they are
    to be those of a real run as far as 1 and multiples of 16 go. Tensors count as allocated at 16-byte addresses.
    RuntimeError under TRITON_INTERPRET (there are no kernels to compile then), or when the module has no `launch`.
    """
    refuse_interpreter()
    found: dict[str, Launch] = {}

    def note(kernel: Any, grid: object, *args: Any, **named: Any) -> None:
        launch = specialise(kernel, args, named)
        found.setdefault(launch.key, launch)

    with _replaced(module, launch=note, KERNELS_ON_CPU=True):
        call()
    return list(found.values())


def refuse_interpreter() -> None:
    """RuntimeError when TRITON_INTERPRET is set: interpreted kernels cannot be compiled in the same process."""
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y"):
        raise RuntimeError("cross-compiling needs a process without TRITON_INTERPRET: unset it and start again")


def specialise(kernel: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> Launch:
    """The launch of `kernel` with these arguments. TypeError for an argument no kernel takes, or a missing one."""
    if not isinstance(kernel, JITFunction):
        raise TypeError(f"launch was given {type(kernel).__name__}, not a triton.jit function")
    parameters = {p.name: p for p in kernel.params}
    given = {name: value for name, value in named.items() if name in parameters}
    bound = inspect.signature(kernel.fn).bind(*args, **given)
    bound.apply_defaults()
    arguments = tuple(_argument(parameters[name], value) for name, value in bound.arguments.items())
    options = tuple(sorted((name, value) for name, value in named.items() if name not in parameters))
    return Launch(kernel.fn.__name__, arguments, options, kernel)


def _argument(parameter: Any, value: Any) -> Argument:
    name = parameter.name
    if parameter.is_constexpr or value is None:
        return Argument(name, "constexpr", value=value)
    special, align = not parameter.do_not_specialize, not parameter.do_not_specialize_on_alignment
    if isinstance(value, torch.Tensor):
        return _tensor(name, value, bool(parameter.is_const), aligned=special and align)
    written = str(parameter.annotation_type or "")
    if isinstance(value, bool):
        return Argument(name, written or "u1")
    if isinstance(value, int):
        return _integer(name, value, written, special, align)
    if isinstance(value, float):
        return Argument(name, written or "fp32")
    raise TypeError(f"argument {name}: a kernel takes tensors, numbers and None, not {type(value).__name__}")


def _integer(name: str, value: int, written: str, special: bool, align: bool) -> Argument:
    if value == 1 and special and not written:
        return Argument(name, "constexpr", value=1)
    kind = written or ("i32" if -(2**31) <= value < 2**31 else "i64" if value < 2**63 else "u64")
    return Argument(name, kind, divisible=special and align and value % ALIGNMENT == 0)


def _tensor(name: str, tensor: torch.Tensor, is_const: bool, aligned: bool) -> Argument:
    offset = tensor.storage_offset() * tensor.element_size()  # the allocation itself is taken as aligned
    return Argument(
        name,
        ("*k" if is_const else "*") + _POINTEE[tensor.dtype],
        divisible=aligned and offset % ALIGNMENT == 0,
        within_2gb=tensor.untyped_storage().nbytes() <= POINTER_RANGE,
    )


@contextmanager
def _replaced(module: ModuleType, **attributes: object) -> Iterator[None]:
    missing = [name for name in attributes if not hasattr(module, name)]
    if missing:
        raise RuntimeError(f"module {module.__name__} has no {' and no '.join(missing)}: not made by spdsl")
    before = {name: getattr(module, name) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
