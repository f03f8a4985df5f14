"""roofline: seconds of a kernel on a GPU: what takes longest of products, exponentials and bytes, and its launch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from spdsl.cost.efficiency import efficiency, launch_seconds
from spdsl.cost.kernels import Kernel
from spdsl.cost.phases import Stage
from spdsl.passes.count import Shape
from spdsl.targets import Target

_DTYPES = {1: "fp8", 2: "bf16", 4: "tf32", 8: "fp64"}
_TF32_PRODUCTS = 3  # a float32 product is three of tf32
SELECTING = ("score", "select")


@dataclass(frozen=True, slots=True)
class Time:
    """Seconds. `exact` is false where some count behind it is a bound."""

    products: float
    exponentials: float
    bytes: float
    launches: float
    exact: bool

    @property
    def seconds(self) -> float:
        return max(self.products, self.exponentials, self.bytes) + self.launches


def time(kernel: Kernel, target: Target, size: int) -> Time:
    products, moved = shares(target, kernel.rate)
    exact = kernel.machine.exact and kernel.moved.exact
    return Time(
        kernel.machine.value / (matrix_rate(target, size) * products),
        kernel.exps.value / target.exponentials if target.exponentials else 0.0,
        kernel.moved.value / (target.bandwidth * moved),
        (kernel.launches + kernel.operators) * launch_seconds(),
        exact,
    )


def shares(target: Target, kind: str) -> tuple[float, float]:
    """Of the matrix rate and of the bandwidth. What is measured of one is bound by it: the other is not the limit."""
    own = efficiency(target.name, kind)
    if own.of == "rate":
        return own.value, efficiency(target.name, "copy").value
    return efficiency(target.name, "forward").value, own.value


def matrix_rate(target: Target, size: int) -> float:
    """Dense FLOP/s of the products of numbers of `size` bytes; ValueError where the GPU has none."""
    rate = target.rate(_DTYPES[size])
    return rate / _TF32_PRODUCTS if size == 4 else rate


def seconds(kernels: Iterable[Kernel], target: Target, size: int) -> float:
    return sum(time(kernel, target, size).seconds for kernel in kernels)


def selecting_share(kernels: list[Kernel], target: Target, size: int) -> float:
    """How much of the time scoring, choosing and making lists take, of entries that only score included."""
    parts = (*SELECTING, "lists")
    whole = seconds(kernels, target, size)
    return seconds((kernel for kernel in kernels if kernel.part in parts), target, size) / whole if whole else 0.0


# ---- dense attention of the same shape


def dense_seconds(stage: Stage, length: int, shape: Shape, target: Target, causal: bool = True) -> float:
    """The best dense attention of the GPU: one kernel forward, three backward, two in decode, and an append."""
    pairs = length * (length + 1) // 2 if causal else length * length
    rows, row = shape.batch * length * shape.heads, (shape.qk + shape.v) * shape.size
    keys = shape.batch * length * shape.kv_heads * row
    if stage is Stage.DECODE:
        moved, launches = keys, 3
        flops = 2 * shape.batch * shape.heads * length * (shape.qk + shape.v)
        kind = "dense_decode"
    else:
        back = stage is Stage.BACKWARD
        moved, launches = (2 if back else 1) * (rows * row + keys), 3 if back else 2 if stage is Stage.PREFILL else 1
        products = 3 * shape.qk + 2 * shape.v if back else shape.qk + shape.v
        flops = 2 * shape.batch * shape.heads * pairs * products
        kind = "dense_backward" if back else "dense_forward"
    rate, bandwidth = shares(target, kind)
    return max(flops / (matrix_rate(target, shape.size) * rate), moved / (target.bandwidth * bandwidth)) + (
        launches * launch_seconds()
    )
