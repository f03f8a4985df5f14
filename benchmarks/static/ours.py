"""The kernels of our patterns: what they launch, and what a call asks of each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property

import spdsl
from benchmarks.static.demand import Demand, demands
from benchmarks.static.kept import digest_of
from spdsl.api import source_of
from spdsl.compiler import plan_of
from spdsl.ir.plan import Plan
from spdsl.ir.schedule import Stage
from spdsl.machine.cubins import key
from spdsl.machine.kernel_text import whole_text
from spdsl.machine.launches import Launch
from spdsl.machine.survey import HEADS, survey
from spdsl.passes.count import Shape, shape_of
from spdsl.resources import folder
from spdsl.targets import Target

USUAL = (("bf16",), ((128, 128),))
EVERY = (("bf16", "fp16", "fp32"), ((64, 64), (128, 128), (192, 128), (256, 256)))
STAGES = {
    "train": (Stage.FORWARD, Stage.BACKWARD), "prefill": (Stage.PREFILL,), "decode": (Stage.DECODE,),
}  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """One launch of one pattern."""

    pattern: str
    launch: Launch
    heads: tuple[int, int]
    """Of queries and keys."""
    demand: Demand | None
    """None for a kernel whose products are no pairs of a query head and a key."""

    @cached_property
    def digest(self) -> str:
        """Equal for kernels of equal text and configuration, in whatever pattern."""
        return digest_of(whole_text(self.launch.kernel), key(self.launch))


def sources() -> dict[str, str]:
    """The shipped patterns, and nsa at the head dims of its peers.

    Launches are recorded of short sequences, so what is dense for short ones is so for shorter ones here.
    """
    found = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder("patterns").glob("*.spat"))}
    found["nsa 128"] = re.sub(r"dim .*\n", "dim qk = 128, v = 128\n", found["nsa"])
    return {name: text.replace("length < 8192", "length < 64") for name, text in found.items()}


def kernels(name: str, text: str, target: Target, every: bool = False) -> Iterator[Kernel]:
    """Each kernel of a pattern once, in bf16; with `every` in all phases, dtypes and dims."""
    module, plan = spdsl.load(text), plan_of(source_of(text), None, {})
    seen: set[str] = set()

    @cache
    def asked(stage: Stage, shape: Shape) -> dict[str, Demand]:
        return demands(plan, stage, module, shape, target)

    for launch in survey(module, *(EVERY if every else USUAL), target):
        assert launch.workload is not None
        if every or launch.name not in seen:
            seen.add(launch.name)
            shape = _shape(plan, launch)
            found = (asked(stage, shape) for stage in STAGES[launch.workload.phase])
            own = next((one[launch.name] for one in found if launch.name in one), None)
            yield Kernel(name, launch, (shape.heads, shape.kv_heads), own)


def _shape(plan: Plan, launch: Launch) -> Shape:
    """Of one sequence, with the heads that the launch was recorded with."""
    workload = launch.workload
    assert workload is not None
    size = 4 if workload.dtype == "fp32" else 2
    return shape_of(plan.pattern, Shape(1, *HEADS, workload.qk_dim, workload.v_dim, size))
