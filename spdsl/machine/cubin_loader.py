"""Runs the binaries that lie beside this file, so that a deployment compiles nothing. Needs torch and the CUDA driver.

    import cubin_loader, my_pattern
    cubin_loader.install(my_pattern, strict=True)

A launch is looked up by its kernel, its architecture and its specialisation: types, constants, which integers are 1,
and which integers and addresses are multiples of 16. One that is not in manifest.json goes to Triton, or with `strict`
is a LookupError. Binaries of another module (its text, its parameters) or another Triton are not used: a warning, or
with `strict` a LookupError. hsaco files in the folder are for a loader of your own.
"""

from __future__ import annotations

import ctypes
import hashlib
import inspect
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

FREE_SHARED = 49_152  # bytes that a block gets without asking (CUDA C++ Programming Guide)
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
SCRATCH = 2  # pointers behind the arguments of every kernel, of global and of profiling memory; none is used here

_SIZES: dict[str, Any] = {
    "i8": ctypes.c_int8, "i16": ctypes.c_int16, "i32": ctypes.c_int32, "i64": ctypes.c_int64, "u1": ctypes.c_uint8,
    "u8": ctypes.c_uint8, "u16": ctypes.c_uint16, "u32": ctypes.c_uint32, "u64": ctypes.c_uint64,
    "fp32": ctypes.c_float, "fp64": ctypes.c_double,
}  # fmt: skip
_POINTEES = {
    torch.bool: "u1", torch.uint8: "u8", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64",
}  # fmt: skip


def install(
    module: ModuleType, folder: Path | str | None = None, *, strict: bool = False, library: Any = None
) -> Cubins:
    """From now on `module` runs the binaries of the folder (by default that of this file); `remove` ends it.

    TypeError for what is no module that spdsl made, LookupError with `strict` for binaries of another one.
    """
    if not all(hasattr(module, name) for name in ("MODULE", "PARAMS", "rt")):
        raise TypeError(f"module: expected one that spdsl made, got {getattr(module, '__name__', module)}")
    if not isinstance(folder, Path | str | None):
        raise TypeError(f"folder: expected a path, got {type(folder).__name__}")
    if not isinstance(strict, bool):
        raise TypeError(f"strict: expected True or False, got {type(strict).__name__}")
    return Cubins(module, Path(folder or Path(__file__).parent), strict, library)


class Cubins:
    """The binaries of a folder in place of what starts the kernels of a module, and those of its library for it."""

    def __init__(self, module: ModuleType, folder: Path, strict: bool, library: Any = None) -> None:
        self.module, self.folder, self.strict = module, folder, strict
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        other = differences(manifest, vars(module))
        if other and strict:
            raise LookupError(f"no binaries for {module.__name__} in {folder}: {'; '.join(other)}")
        if other:
            warnings.warn(f"the binaries in {folder} are not used: {'; '.join(other)}", stacklevel=3)
        kernels = [] if other else manifest["kernels"]
        cubins = [entry for entry in kernels if entry["backend"] == "cuda"]
        self.known = {(entry["architecture"], entry["key"]): entry for entry in cubins}
        self.driver = Driver(library)
        self.functions: dict[tuple[int, str], Any] = {}
        self.before: Callable[..., None] | None = module.MODULE.start
        module.MODULE.start = self.launch

    def remove(self) -> None:
        self.module.MODULE.start = self.before

    def launch(
        self, kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, num_stages: int, **named: Any
    ) -> None:
        if min(grid) == 0:
            return
        leaves = list(leaves_of(kernel, args, named))
        key = key_of(kernel.__name__, [specialised(x) for x in leaves], num_warps, num_stages)
        device = next(x.device for x in leaves if isinstance(x, torch.Tensor))
        found = self.known.get((architecture_of(device), key))
        if found is None:
            if self.strict:
                raise LookupError(f"no binary for {architecture_of(device)} and {key}")
            compiling = self.before or self.module.rt.with_triton
            compiling(kernel, grid, *args, num_warps=num_warps, num_stages=num_stages, **named)
            return
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            function = self.function(device.index or 0, found)
            self.driver.start(function, grid, found["threads"], found["shared"], stream, packed(leaves))

    def function(self, device: int, entry: dict[str, Any]) -> Any:
        """The function of a binary on a device; loaded once, and only if its digest is that of the manifest."""
        place = (device, entry["file"])
        if place not in self.functions:
            image = (self.folder / Path(entry["file"]).name).read_bytes()
            if hashlib.sha256(image).hexdigest() != entry["sha256"]:
                raise RuntimeError(f"{entry['file']} is not the file that manifest.json describes")
            self.functions[place] = self.driver.load(image, entry["entry"], entry["shared"])
        return self.functions[place]


def identity(names: Mapping[str, Any]) -> dict[str, Any]:
    """What a module is, from its names: pattern, parameters, and digests: `digest` is that of its source and library,
    `text` that of what was imported. An import in a second place is the same.
    """
    spec: Any = names.get("__spec__")
    source = spec.loader.get_source(spec.name) if hasattr(getattr(spec, "loader", None), "get_source") else None
    text = None if source is None else hashlib.sha256(source.encode()).hexdigest()
    return {"pattern": names["PATTERN"], "params": names["PARAMS"], "digest": names["MODULE"].digest, "text": text}


def differences(manifest: Mapping[str, Any], names: Mapping[str, Any]) -> list[str]:
    """What the module of these names, and the Triton that it has, are not as the manifest says."""
    own = {**identity(names), "triton": getattr(names["rt"].triton, "__version__", None)}
    theirs = {**manifest.get("module", {}), **{name: manifest[name] for name in ("triton",) if name in manifest}}
    unknown = [name for name in own if name not in theirs]
    if unknown:
        return [f"manifest.json does not say the {' and the '.join(unknown)} of their module: written before spdsl did"]
    known = {name: value for name, value in own.items() if value is not None}  # no Triton, or no source, here
    return [f"{name} is {value}, theirs {theirs[name]}" for name, value in known.items() if value != theirs[name]]


class Driver:
    """The few functions of the CUDA driver (CUDA Driver API: module and execution control)."""

    def __init__(self, library: Any = None) -> None:
        self._library = library

    @property
    def library(self) -> Any:
        if self._library is None:
            self._library = ctypes.CDLL("libcuda.so.1")
        return self._library

    def load(self, image: bytes, name: str, shared: int) -> Any:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(image))
        self._call("cuModuleGetFunction", ctypes.byref(function), module, ctypes.c_char_p(name.encode()))
        if shared > FREE_SHARED:
            self._call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED, shared)
        return function

    def start(
        self, function: Any, grid: tuple[int, ...], threads: int, shared: int, stream: int, values: list[Any]
    ) -> None:
        places = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        sides = (*grid, 1, 1)[:3]
        self._call("cuLaunchKernel", function, *sides, threads, 1, 1, shared, ctypes.c_void_p(stream), places, None)

    def _call(self, name: str, *args: Any) -> None:
        status = getattr(self.library, name)(*args)
        if status != 0:
            raise RuntimeError(f"{name} failed: CUDA error {status}")


def leaves_of(kernel: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Iterator[Any]:
    """Every argument of a kernel that is no tuple, in order; a constant as `Constant`."""
    signature = inspect.signature(getattr(kernel, "fn", kernel))
    bound = signature.bind(*args, **named)
    bound.apply_defaults()
    for name, value in bound.arguments.items():
        if "constexpr" in str(signature.parameters[name].annotation):
            yield Constant(value)
        else:
            yield from _leaves(value)


_CONSTANT = ("constexpr", "JITFunction")  # device functions, too, are what a kernel is compiled for


class Constant:
    """What a kernel was compiled for."""

    def __init__(self, value: Any) -> None:
        self.value = value.value if type(value).__name__ == "constexpr" else value


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple):
        for item in value:
            yield from _leaves(item)
    elif value is None or type(value).__name__ in _CONSTANT or (type(value) is int and value == 1):
        yield Constant(value)
    else:
        yield value


def specialised(leaf: Any) -> str:
    """A leaf as the key has it: `*bf16/16`, `i32`, `=64`."""
    if isinstance(leaf, Constant):
        return constant_text(leaf.value)
    if isinstance(leaf, torch.Tensor):
        return leaf_text("*" + _POINTEES[leaf.dtype], leaf.data_ptr() % 16 == 0)
    return leaf_text(type_of(leaf), type(leaf) is int and leaf % 16 == 0)


def constant_text(value: Any) -> str:
    """Of a number, a string or None as Python writes it; of a Triton dtype its name."""
    plain = value is None or isinstance(value, bool | int | float | str)
    return f"={value!r}" if plain else f"={getattr(value, '__name__', value)}"


def leaf_text(kind: str, divisible: bool) -> str:
    return kind + "/16" * divisible


def key_of(kernel: str, leaves: list[str], num_warps: int, num_stages: int) -> str:
    return f"{kernel}({', '.join(leaves)}) warps {num_warps} stages {num_stages}"


def type_of(leaf: Any) -> str:
    if isinstance(leaf, bool):
        return "u1"
    if isinstance(leaf, float):
        return "fp32"
    return "i32" if -(2**31) <= leaf < 2**31 else "i64" if leaf < 2**63 else "u64"


def packed(leaves: list[Any]) -> list[Any]:
    """The parameters of a launch: every leaf that is no constant, then the scratch pointers."""
    values: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            values.append(ctypes.c_uint64(leaf.data_ptr()))
        elif not isinstance(leaf, Constant):
            values.append(_SIZES[type_of(leaf)](leaf))
    return values + [ctypes.c_uint64(0) for _ in range(SCRATCH)]


def architecture_of(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
