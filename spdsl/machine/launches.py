"""What is known of one kernel launch: all that Triton specialises a kernel on, leaf by leaf, and no tensor.

Triton 3.6 to 3.9 (`JITFunction.run` and its native specialisation) look at types, at constexprs, at which integers are
1, which integers and pointers are multiples of 16, which arguments are None, and which tensors stay below 2 GB. A tuple
is looked at item by item, and its items are specialised whatever the parameter says about itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton.language as tl
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

Path = tuple[int, ...]
"""The place of a leaf: the position of its argument, then those inside its tuples."""


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument, or one item of a tuple, as Triton sees it."""

    name: str
    type: str
    """As in a signature: `*bf16`, `i32`, `constexpr`; of a tuple the name of its class."""
    divisible: bool = False
    """A multiple of 16: the integer, or the address in bytes."""
    within_2gb: bool = False
    value: Any = None
    """Of a constexpr only, which is also what an integer 1 and a None become."""
    items: tuple[Argument, ...] = ()
    container: Callable[..., tuple[Any, ...]] | None = None
    """The class of a tuple, which the kernel needs for the names of its fields; None for a leaf."""

    @property
    def signature(self) -> Any:
        """A type, or a tuple of the same class with types in it."""
        if self.container is None:
            return self.type
        types = [item.signature for item in self.items]
        return self.container(*types) if hasattr(self.container, "_fields") else tuple(types)


@dataclass(frozen=True, slots=True)
class Workload:
    """The call that a launch belongs to."""

    phase: str
    """`train` (forward and backward), `prefill` or `decode`."""
    dtype: str
    qk_dim: int
    v_dim: int

    def __str__(self) -> str:
        return f"{self.phase} {self.dtype} {self.qk_dim}/{self.v_dim}"


@dataclass(frozen=True)
class Launch:
    """One kernel with one specialisation: all that a compiler needs."""

    name: str
    arguments: tuple[Argument, ...]
    options: tuple[tuple[str, Any], ...]
    """`num_warps`, `num_stages` and whatever else was given that the kernel has no parameter for, sorted."""
    kernel: Any = field(repr=False)
    workload: Workload | None = None

    @property
    def key(self) -> str:
        """Equal for two launches that share a compiled kernel."""
        return repr((self.name, self.arguments, self.options, id(self.kernel)))

    @property
    def constexprs(self) -> dict[str, Any]:
        """By name, `C.BLOCK_M` for an item of a tuple."""
        return {name: leaf.value for _, name, leaf in self.leaves() if leaf.type == "constexpr"}

    def leaves(self) -> Iterator[tuple[Path, str, Argument]]:
        """Every argument that is no tuple: its path, its name with those of its tuples, and itself."""
        return _leaves(self.arguments)

    def attributes(self, backend: str) -> dict[Path, list[list[Any]]]:
        """The attributes of `ASTSource`, by path; `backend` is `cuda` or `hip`."""
        found = {}
        for path, _, leaf in self.leaves():
            known: list[list[Any]] = [["tt.divisibility", ALIGNMENT]] if leaf.divisible else []
            if backend == "hip" and leaf.within_2gb:
                known.append(["tt.pointer_range", 32])
            if known:
                found[path] = known
        return found

    def source(self, backend: str) -> ASTSource:
        """What `triton.compile` takes, the same as a launch on that backend would give it."""
        signature = {a.name: a.signature for a in self.arguments}
        constexprs = {path: leaf.value for path, _, leaf in self.leaves() if leaf.type == "constexpr"}
        return ASTSource(self.kernel, signature, constexprs, self.attributes(backend))


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


@dataclass(frozen=True, slots=True)
class _Rules:
    """What a parameter says about its argument; the defaults hold for the items of tuples."""

    written: str = ""
    const: bool = False
    special: bool = True
    align: bool = True


_ITEM = _Rules()


def _argument(parameter: Any, value: Any) -> Argument:
    if parameter.is_constexpr:
        return _constexpr(parameter.name, value)
    special, align = not parameter.do_not_specialize, not parameter.do_not_specialize_on_alignment
    rules = _Rules(str(parameter.annotation_type or ""), bool(parameter.is_const), special, align)
    return _specialised(parameter.name, value, rules)


def _specialised(name: str, value: Any, rules: _Rules) -> Argument:
    if value is None or isinstance(value, tl.constexpr | JITFunction):
        return _constexpr(name, value)
    if isinstance(value, tuple):
        return _tuple(name, value)
    if isinstance(value, torch.Tensor):
        return _tensor(name, value, rules)
    if isinstance(value, bool):
        return Argument(name, rules.written or "u1")
    if isinstance(value, int):
        return _integer(name, value, rules)
    if isinstance(value, float):
        return Argument(name, rules.written or "fp32")
    raise TypeError(f"argument {name}: a kernel takes tensors, numbers, tuples and None, not {type(value).__name__}")


def _constexpr(name: str, value: Any) -> Argument:
    return Argument(name, "constexpr", value=value.value if isinstance(value, tl.constexpr) else value)


def _tuple(name: str, value: tuple[Any, ...]) -> Argument:
    names = getattr(value, "_fields", range(len(value)))
    items = tuple(_specialised(str(field), item, _ITEM) for field, item in zip(names, value, strict=True))
    return Argument(name, type(value).__name__, items=items, container=type(value))


def _integer(name: str, value: int, rules: _Rules) -> Argument:
    if value == 1 and rules.special and not rules.written:
        return _constexpr(name, 1)
    kind = rules.written or ("i32" if -(2**31) <= value < 2**31 else "i64" if value < 2**63 else "u64")
    return Argument(name, kind, divisible=rules.special and rules.align and value % ALIGNMENT == 0)


def _tensor(name: str, tensor: torch.Tensor, rules: _Rules) -> Argument:
    offset = tensor.storage_offset() * tensor.element_size()  # the allocation itself is taken as aligned
    return Argument(
        name,
        ("*k" if rules.const else "*") + _POINTEE[tensor.dtype],
        divisible=rules.special and rules.align and offset % ALIGNMENT == 0,
        within_2gb=tensor.untyped_storage().nbytes() <= POINTER_RANGE,
    )


def _leaves(arguments: Iterable[Argument], path: Path = (), prefix: str = "") -> Iterator[tuple[Path, str, Argument]]:
    for position, argument in enumerate(arguments):
        place, name = (*path, position), prefix + argument.name
        if argument.container is None:
            yield place, name, argument
        else:
            yield from _leaves(argument.items, place, f"{name}.")
