"""What a build can refuse: kernels that spill, products that no tensor core computes or that are computed twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line names the gates, and does not wait for triton
    from spdsl.machine.crosscompile import Compiled


def offences(compiled: Iterable[Compiled], gates: Iterable[str]) -> Iterator[str]:
    """One line for each kernel and gate that it does not pass; with any gate a kernel has to compile and to fit."""
    wanted = [_GATES[name] for name in gates]
    for one in compiled:
        if wanted and one.error is not None:
            yield f"{described(one)}: {one.error.strip().splitlines()[-1]}"
        elif wanted and not one.fits:
            shared = f"{one.shared} of {one.shared_limit} bytes of shared memory"
            yield f"{described(one)}: no block fits ({shared}, {one.registers} registers)"
        elif one.error is None:
            yield from (f"{described(one)}: {found}" for gate in wanted if (found := gate(one)))


def described(one: Compiled) -> str:
    """Kernel, call, target and configuration."""
    known = dict(one.constexprs)
    tile = "" if "C.BLOCK_M" not in known else f" {known['C.BLOCK_M']}x{known['C.BLOCK_N']}"
    return f"{one.kernel} ({one.workload}) for {one.target},{tile} warps {one.num_warps} stages {one.num_stages}"


def _spills(one: Compiled) -> str:
    return f"{one.spills} spills" if one.spills else ""


def _no_tensor_cores(one: Compiled) -> str:
    """A kernel without a product has none to give to tensor cores."""
    if not one.multiplies or one.loop_instructions:
        return ""
    return f"0 tensor-core instructions in its loops, {one.tensor_core_instructions} outside"


def redundant(one: Compiled) -> str:
    """Of the products in its loops the one that is computed most often."""
    worst = max(one.products, key=lambda product: product.times, default=None)
    if worst is None or worst.times == 1:
        return ""
    reach = f"{worst.reach[0]}x{worst.reach[1]}"
    return f"a product of {worst.rows}x{worst.columns} is computed {worst.times} times: its warps take {reach} at once"


_GATES: dict[str, Callable[[Compiled], str]] = {
    "spills": _spills,
    "no-tensor-cores": _no_tensor_cores,
    "redundant": redundant,
}
GATES = tuple(_GATES)
