"""How long a kernel takes at least, by each of the things that it needs, and with them one after the other.

Nothing here is a time: a kernel that reaches one of these bounds is limited by it alone. Ratios of kernels of the same
kind tell more than the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.static.code import Code, LoopCode
from spdsl.targets import Target

ISSUE_CLOCK = 1.755e9
"""Hertz: the highest clock of an H100 PCIe (chipsandcheese.com, 2 July 2023). An H200 runs faster for a while, slower
while its tensor cores are busy. The rates of the target are for 1.83 GHz."""
L2 = 7.5e12
"""Bytes per second, assumed: no data sheet tells. 5,120 bytes a clock, which NVIDIA's A100 white paper has, would be
9.0e12 at this clock; measured figures stay below."""
WARP = 32  # threads
NAMES = ("tensor", "issue", "exp2", "L2", "HBM")


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one multiplied pair of a query head and a key."""

    multiplied: float
    """Multiplications of the matrix unit."""
    slots: float
    """Instructions of warps."""
    exponentials: float
    loaded: float
    """Bytes."""

    def mixed(self, other: Cost, share: float) -> Cost:
        """`share` of the pairs at the cost of the other."""
        return Cost(
            *(
                (1 - share) * getattr(self, name) + share * getattr(other, name)
                for name in ("multiplied", "slots", "exponentials", "loaded")
            )
        )


def cost(loop: LoopCode, warps: int, per_pair: int, turns: float = 0.0) -> Cost:
    """Of a loop whose program multiplies `per_pair` numbers for each pair.

    `turns`: iterations of it in one of the loop around it, whose instructions count then, too; 0: many.
    """
    pairs = loop.wanted / per_pair
    instructions = loop.instructions + (loop.around / turns if turns else 0)
    return Cost(
        loop.multiplied / pairs, instructions * warps / pairs, loop.exponentials * warps * WARP / pairs,
        loop.loaded / pairs,
    )  # fmt: skip


def cost_of(code: Code, per_pair: int, masked: float = 0.0, turns: float = 0.0) -> Cost | None:
    """Of a kernel: of its shortest loop, and where it has another one for masked blocks, that share of the longest.

    None for a kernel without a loop that multiplies.
    """
    found = sorted(
        (cost(loop, code.warps, per_pair, turns) for loop in code.loops if loop.wanted), key=lambda one: one.slots
    )
    return found[0].mixed(found[-1], masked) if found else None


def bounds(one: Cost, pairs: float, moved: float, target: Target) -> dict[str, float]:
    """Seconds by name. `pairs` that are multiplied, `moved` bytes of memory with each tensor once."""
    return {
        "tensor": pairs * one.multiplied * 2 / target.rate("bf16"),
        "issue": pairs * one.slots / (target.sm_count * target.schedulers * ISSUE_CLOCK),
        "exp2": pairs * one.exponentials / target.exponentials,
        "L2": pairs * one.loaded / L2,
        "HBM": moved / target.bandwidth,
    }


def serial(found: dict[str, float]) -> float:
    """Nothing overlaps but memory with its cache: what comes from HBM comes through L2."""
    return found["tensor"] + found["issue"] + found["exp2"] + max(found["L2"], found["HBM"])


def binding(found: dict[str, float]) -> str:
    return max(NAMES, key=lambda name: found[name])
