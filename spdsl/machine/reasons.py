"""reasons: why a compiled kernel spills, has no tensor cores in its loops or computes twice, in numbers of its tile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from spdsl.machine.build_gates import described, redundant
from spdsl.runtime.tuning.configs import Config
from spdsl.runtime.tuning.footprint import KernelShape, matrix_unit, registers
from spdsl.targets import find

if TYPE_CHECKING:
    from spdsl.machine.crosscompile import Compiled

KINDS = ("dkdv", "dq", "decode", "forward", "select")  # last words of kernel names, and how `footprint` calls them


def reasons(compiled: Iterable[Compiled]) -> Iterator[str]:
    """One line for each kernel that spills, or whose products are computed twice or not in tensor cores of a loop."""
    for one in compiled:
        if one.error is None and one.spills:
            yield f"{described(one)}: {one.spills} spills: {_of_registers(one)}"
        if one.error is None and one.multiplies and not one.loop_instructions:
            yield f"{described(one)}: no tensor cores in a loop: {_of_products(one)}"
        if one.error is None and one.computed > 1:
            yield f"{described(one)}: {redundant(one)}; fewer warps or more rows compute it once"


def _of_registers(one: Compiled) -> str:
    target = find(one.target)
    threads = one.num_warps * target.warp_size
    most = min(target.registers_per_thread, target.registers_per_sm // threads)
    tile = "" if (held := _accumulators(one)) is None else f", {held} of them with sums and scores of its tile"
    if one.registers < most * 15 // 16:
        return f"the compiler keeps to {one.registers} registers of the {most} that a thread can have{tile}"
    return f"a thread can have {most} registers{tile}; smaller blocks or more warps, as `spdsl tune` tries, need fewer"


def _accumulators(one: Compiled) -> int | None:
    """Registers of a thread for sums and scores; None for a kernel that has no tile."""
    known = dict(one.constexprs)
    kind = next((kind for kind in KINDS if one.kernel.endswith(f"_{kind}")), None)
    if kind is None or "C.BLOCK_M" not in known:
        return None
    shape = KernelShape(kind, int(known["C.QK_DIM"]), int(known["C.V_DIM"]), 2)
    config = Config(int(known["C.BLOCK_M"]), int(known["C.BLOCK_N"]), one.num_warps, one.num_stages)
    return registers(shape, config, matrix_unit(shape, config, find(one.target).architecture))


def _of_products(one: Compiled) -> str:
    if one.tensor_core_instructions:
        return f"its {one.tensor_core_instructions} stand outside: the one block of its tile is not looped over"
    return "its products are computed by ordinary instructions: fp64, or fewer than 16 rows, keys or numbers"
