"""What the machine code of one kernel says: registers, spills, and what its innermost loops do in one iteration."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from spdsl.machine.loop_work import LoopWork, innermost
from spdsl.machine.machine_code import copy_kind, matrix_kind
from spdsl.machine.occupancy import occupancy
from spdsl.machine.sass import Instruction, Loop, instructions, loops
from spdsl.machine.sass import innermost as innermost_loops
from spdsl.targets import Target

# `HGMMA.64x128x16.F32.BF16` of four warps together, `HMMA.16816.F32.BF16` (16 x 8 x 16) of one.
_OF_GROUP = re.compile(r"[HQIBD]GMMA\.(\d+)x(\d+)x(\d+)")
_OF_WARP = re.compile(r"[HQIBD]MMA\.(16|8)(8)(\d+)")
_GROUP = 4  # warps of a warp group
_LOCAL = ("LDL", "STL")


@dataclass(frozen=True, slots=True)
class LoopCode:
    """One iteration of an innermost loop with matrix instructions."""

    tile: tuple[int, int]
    """Rows and columns of its first product: a tile of rows and a block of keys, or the other way round."""
    instructions: int
    """Of one warp."""
    around: int
    """Instructions of one iteration of the loop around it, those of other innermost loops left out; 0 without one."""
    matrix: int
    """Those of them that multiply matrices."""
    multiplied: int
    """Multiplications of a block, as often as the matrix unit does them."""
    wanted: int
    """Those that the program asks for: fewer, where warps repeat one another."""
    loaded: int
    """Bytes that a block loads from global memory."""
    exponentials: int
    """Instructions of one warp."""
    copies: int
    barriers: int
    fences: int
    spills: int


@dataclass(frozen=True, slots=True)
class Code:
    """One compiled kernel."""

    warps: int
    stages: int
    registers: int
    shared: int
    """Bytes of a block."""
    blocks: int
    """That one SM holds at once."""
    limit: str
    """What keeps it from holding more."""
    spills_in_loops: int
    """Loads from and stores to local memory that stand in a loop."""
    spills_outside: int
    matrix: dict[str, int]
    """Matrix instructions by kind."""
    copies: dict[str, int]
    times: int
    """How often a product of its loops is computed, at most."""
    loops: tuple[LoopCode, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def from_dict(data: dict[str, Any]) -> Code:
    loops_of = tuple(LoopCode(**{**loop, "tile": tuple(loop["tile"])}) for loop in data["loops"])
    return Code(**{**data, "loops": loops_of})


def read(
    sass: str, ttgir: str, registers: int, shared: int, warps: int, stages: int, target: Target
) -> Code:  # fmt: skip
    """From the two texts of a compiled kernel, and the numbers that stand in neither. `shared`: bytes of a block."""
    listing = instructions(sass)
    every = loops(listing)
    in_loops = frozenset[int]().union(*(loop.places for loop in every))
    local = [one.place in in_loops for one in listing if one.stem in _LOCAL]
    resident = occupancy(target, registers, shared, warps)
    works = innermost(ttgir)
    matrix = frozenset(one.place for one in listing if matrix_kind(one))
    return Code(
        warps, stages, registers, shared, resident.blocks, resident.limit,
        spills_in_loops=sum(local), spills_outside=len(local) - sum(local),
        matrix=_counted(map(matrix_kind, listing)), copies=_counted(map(copy_kind, listing)),
        times=max((product.times for work in works for product in work.products), default=1),
        loops=tuple(_loops(listing, every, innermost_loops(every, matrix), works, warps)),
    )  # fmt: skip


def _loops(
    listing: Sequence[Instruction], every: Sequence[Loop], inner: Sequence[Loop], works: Sequence[LoopWork], warps: int
) -> Iterator[LoopCode]:
    """Each loop of the machine code with the loop of the program that it is made of."""
    made = [[one for one in listing if one.place in loop.places] for loop in inner]
    multiplied = [multiplications(lines, warps) for lines in made]
    for loop, lines, number, work in zip(inner, made, multiplied, _of_program(multiplied, works), strict=True):
        yield _loop(lines, number, work, _around(loop, every, inner))


def _around(loop: Loop, every: Sequence[Loop], inner: Sequence[Loop]) -> int:
    larger = [other.places for other in every if other.places > loop.places]
    others = frozenset[int]().union(*(one.places for one in inner))
    return len(min(larger, key=len) - others) if larger else 0


def _of_program(multiplied: Sequence[int], works: Sequence[LoopWork]) -> list[LoopWork]:
    """ptxas keeps the order of loops; it may unroll one, and have a loop for what is left over."""
    if len(multiplied) == len(works):
        return list(works)
    found: list[LoopWork] = []
    for number in multiplied:
        rest = [work for work in works if work.executed and number % work.executed == 0]
        new = [work for work in rest if work not in found]
        found.append((new or rest or list(works) or [LoopWork((), 0)])[0])
    return found


def _loop(lines: Sequence[Instruction], multiplied: int, work: LoopWork, around: int) -> LoopCode:
    turns = multiplied / work.executed if work.executed else 1.0  # iterations of the program in one of the code
    stems = Counter(one.stem for one in lines)
    return LoopCode(
        tile=(work.products[0].rows, work.products[0].columns) if work.products else (0, 0),
        instructions=len(lines),
        around=around,
        matrix=sum(matrix_kind(one) is not None for one in lines),
        multiplied=multiplied,
        wanted=round(work.multiplied * turns),
        loaded=round(work.loaded * turns),
        exponentials=sum(one.op.startswith("MUFU.EX2") for one in lines),
        copies=sum(copy_kind(one) is not None for one in lines),
        barriers=stems["BAR"],
        fences=stems["MEMBAR"] + stems["FENCE"],
        spills=sum(stems[stem] for stem in _LOCAL),
    )


def multiplications(lines: Iterable[Instruction], warps: int) -> int:
    """Of all warps of a block."""
    found = 0
    for one in lines:
        if shape := _OF_GROUP.match(one.op):
            found += int(shape[1]) * int(shape[2]) * int(shape[3]) * warps // _GROUP
        elif shape := _OF_WARP.match(one.op):
            found += int(shape[1]) * int(shape[2]) * int(shape[3]) * warps
    return found


def _counted(kinds: Iterable[str | None]) -> dict[str, int]:
    return dict(sorted(Counter(kind for kind in kinds if kind).items()))
