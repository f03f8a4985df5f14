"""Compiling a recorded launch for a GPU that need not be there, and measuring the result."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from spdsl.machine.kernel_text import multiplies
from spdsl.machine.launches import Launch, Workload
from spdsl.machine.machine_code import Code, read_amdgcn, read_cubin
from spdsl.machine.occupancy import Occupancy, occupancy
from spdsl.machine.products import Product, products
from spdsl.machine.record import refuse_interpreter
from spdsl.targets import Target

_NOTHING = Code(registers=0, spills=0, scalar_spills=0, scratch=0, mma=(), loop_mma=(), async_copies=(), widest_load=0)


@dataclass(frozen=True, slots=True)
class Compiled:
    """One launch on one target. With an `error` all numbers are 0 and it does not fit."""

    kernel: str
    target: str
    num_warps: int
    """As the compiler left it; it may add warps to those asked for."""
    num_stages: int
    constexprs: tuple[tuple[str, str], ...]
    """The kernel's constexprs as text, in the order of its parameters; `C.BLOCK_M` for an item of a tuple."""
    error: str | None = None
    code: Code = _NOTHING
    shared: int = 0
    """Bytes of shared memory of one block."""
    shared_limit: int = 0
    """The most this target gives a block, in bytes."""
    tensor_memory: int = 0
    """Columns of tensor memory (compute capability 10.0)."""
    fits: bool = False
    """Whether one block gets its shared and tensor memory and its registers on this target."""
    occupancy: Occupancy = field(default=Occupancy(0, "error", 0))
    workload: Workload | None = None
    """The call that makes this launch, where it is known."""
    multiplies: bool = False
    """Whether the kernel's text has a matrix product."""
    products: tuple[Product, ...] = ()
    """The distinct products in its loops, and how often each is computed."""

    @property
    def ok(self) -> bool:
        return self.error is None

    @property
    def registers(self) -> int:
        return self.code.registers

    @property
    def spills(self) -> int:
        return self.code.spills

    @property
    def tensor_core_instructions(self) -> int:
        return sum(count for _, count in self.code.mma)

    @property
    def loop_instructions(self) -> int:
        """Tensor-core instructions that stand in a loop."""
        return sum(count for _, count in self.code.loop_mma)

    @property
    def computed(self) -> int:
        """How often the products of its loops are computed, at most; 1 where warps share them, or there are none."""
        return max((product.times for product in self.products), default=1)

    @property
    def async_copies(self) -> int:
        return sum(count for _, count in self.code.async_copies)

    def mma(self, kind: str) -> int:
        """How many matrix instructions of that kind: `wgmma`, `mma`, `tcgen05`, `mfma`."""
        return dict(self.code.mma).get(kind, 0)


def compile_launch(launch: Launch, target: Target) -> Compiled:
    """Compile `launch` for `target`. What the compilers refuse comes back as `error`, it is not raised.

    RuntimeError under TRITON_INTERPRET. Nothing is kept on disk but in Triton's own cache.
    """
    refuse_interpreter()
    try:
        return _compile(launch, target)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as problem:  # a panic inside the compiler is no Exception
        return failed(launch, target, f"{type(problem).__name__}: {_reason(problem)}")


def failed(launch: Launch, target: Target, error: str) -> Compiled:
    """The result of a compilation that gave nothing."""
    options = dict(launch.options)
    return Compiled(
        kernel=launch.name,
        target=target.name,
        num_warps=int(options.get("num_warps", 0)),
        num_stages=int(options.get("num_stages", 0)),
        constexprs=_texts(launch),
        error=error,
        shared_limit=target.shared_per_block,
        workload=launch.workload,
        multiplies=multiplies(launch.kernel),
    )


def built(launch: Launch, target: Target) -> Any:
    """Triton's compiled kernel, with the text of every stage in `asm`. Raises what the compilers raise."""
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    return triton.compile(launch.source(target.backend), target=gpu, options=dict(launch.options))


def _compile(launch: Launch, target: Target) -> Compiled:
    made = built(launch, target)
    code = read_amdgcn(made.asm["amdgcn"]) if target.backend == "hip" else read_cubin(made.asm["cubin"])
    num_warps, shared = int(made.metadata.num_warps), int(made.metadata.shared)
    tensor_memory = int(getattr(made.metadata, "tmem_size", 0) or 0)
    resident = occupancy(target, code.registers, shared, num_warps)
    return Compiled(
        kernel=launch.name,
        target=target.name,
        num_warps=num_warps,
        num_stages=int(made.metadata.num_stages),
        constexprs=_texts(launch),
        code=code,
        shared=shared,
        shared_limit=target.shared_per_block,
        tensor_memory=tensor_memory,
        fits=resident.blocks > 0 and tensor_memory <= target.tensor_memory_columns,
        occupancy=resident,
        workload=launch.workload,
        multiplies=multiplies(launch.kernel),
        products=products(made.asm["ttgir"]),
    )


def _texts(launch: Launch) -> tuple[tuple[str, str], ...]:
    return tuple((name, _text(value)) for name, value in launch.constexprs.items())


def _text(value: Any) -> str:
    return str(getattr(value, "__name__", value))


def _reason(problem: BaseException) -> str:
    """The message of an error and of its causes; Triton puts the reason in the last of them."""
    parts: list[str] = []
    current: BaseException | None = problem
    while current is not None:
        text = str(current).strip()
        if text and text not in parts:
            parts.append(text)
        current = current.__cause__
    return os.linesep.join(parts) or "no message"
