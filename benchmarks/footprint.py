"""Samples of the shared memory that Triton gives generated kernels, for spdsl/runtime/tuning/footprint_terms.py.

    cd benchmarks/results/footprint
    python -m benchmarks.footprint --count 500 --output shared.csv
    python -m benchmarks.footprint --seed 77 --count 350 --besides shared.csv --output blind.csv
    python -m benchmarks.footprint --registers --count 150 --output registers.csv

Draws kernels, targets and configurations at random with a seed, lets Triton allocate shared memory (no assembler is
needed for that), and appends one line for each to a CSV file; what the file has already is not made again. The
configurations are those of the tables and what tuning tries beside them, as far as no more than two blocks' shared
memory is needed. With --registers kernels that fit are assembled, too, and the last columns are registers and spills.
"""

from __future__ import annotations

import argparse
import csv
import random
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend

import spdsl
from benchmarks.footprint_samples import Assembled, Sample, read
from spdsl import targets
from spdsl.machine.crosscompile import compile_launch
from spdsl.machine.launches import Launch
from spdsl.machine.survey import survey
from spdsl.resources import folder
from spdsl.runtime.launch import launch as launching
from spdsl.runtime.tuning.candidates import STEPS, UNIT_KERNELS, UNIT_STEPS, blocks_fit, stepped
from spdsl.runtime.tuning.configs import Config, lookup, plain_name
from spdsl.targets import Target

SEED = 2026
ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
WEIGHTS = (4, 1, 5, 5, 4)
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
DIMS = (*((d, d) for d in (16, 24, 32, 40, 48, 64, 64, 72, 80, 96, 112, 128, 128, 160, 192, 256)), (192, 128))
# causal and streaming_llm: ranges; document: lists and tensors that are read; alibi: a bias
RANGES = ("causal", "causal", "streaming_llm", "streaming_llm", "document", "document", "alibi", "alibi")
OTHERS = ("sink_attention", "block_sparse", "big_bird", "dilated", "prefix_lm", "longformer", "sparse_transformer")
GROUPS = (1, 2, 5, 8, 16)  # of nsa; its blocks of 64 keys bound those of the kernels
APART = "moba"  # a list for each head: rows are gathered
KINDS = ("forward", "dq", "dkdv", "decode", "select")
MOST_BLOCKS = 2  # limits of a block up to which a sample is kept


class Draw(NamedTuple):
    """What one sample is drawn for: a kernel of a pattern by a random number, since patterns differ in theirs."""

    pattern: str
    pick: int
    dtype: str
    dims: tuple[int, int]
    step: tuple[float, float, float, int]  # from the configuration of the tables
    architecture: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--registers", action="store_true")
    parser.add_argument("--besides", type=Path, help="a file whose samples are not made again")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    files = [file for file in (options.besides, options.output) if file and file.exists()]
    known = {sample[:-1] for file in files for sample, _ in read(file)}
    seed, new = options.seed + options.registers, options.output not in files
    with options.output.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow((*Sample._fields, *(Assembled._fields if options.registers else ())))
        for number, draw in enumerate(draws(seed, options.count)):
            for row in taken(draw, known, options.registers):
                writer.writerow(row)
                file.flush()
            print(f"\r{number + 1} of {options.count}", end="", file=sys.stderr, flush=True)


def draws(seed: int, count: int) -> Iterator[Draw]:
    chance = random.Random(seed)
    for _ in range(count):
        yield Draw(
            pattern=chance.choice((*RANGES, *chance.sample(OTHERS, 2), *(f"nsa/{g}" for g in GROUPS), APART)),
            pick=chance.randrange(1 << 16),
            dtype=chance.choice(tuple(DTYPES)),
            dims=chance.choice(DIMS),
            step=chance.choice(UNIT_STEPS),
            architecture=chance.choices(ARCHITECTURES, WEIGHTS)[0],
        )


class Near:
    """In place of `lookup`: one step from the tables. `given` is what each kernel got."""

    def __init__(self, step: tuple[float, float, float, int]) -> None:
        self.step = step
        self.given: dict[str, Config] = {}

    def __call__(self, kernel: str, *place: Any) -> Config:
        default = lookup(kernel, *place)
        near = stepped(default, self.step)
        tried = blocks_fit(near, 0) and self.step in (UNIT_STEPS if kernel in UNIT_KERNELS else STEPS)
        found = near if tried else default
        return self.given.setdefault(plain_name(kernel), found)


def taken(draw: Draw, known: set[tuple[Any, ...]], registers: bool) -> Iterator[tuple[Any, ...]]:
    """The sample of a draw, unless it is known."""
    target = targets.find(draw.architecture)
    near = Near(draw.step)
    found = [launch for launch in launches(draw, target, near) if kernel_of(launch)]
    kinds = sorted({kernel_of(launch) for launch in found})
    of_kind = [launch for launch in found if kernel_of(launch) == kinds[draw.pick % len(kinds)]]
    launch = of_kind[draw.pick // len(kinds) % len(of_kind)]
    known_part = described(draw, launch, near.given[kernel_of(launch)])
    if known_part in known:
        return
    known.add(known_part)
    try:
        found_shared = shared(launch, target)
        if found_shared > MOST_BLOCKS * target.shared_per_block:
            return
        if not registers:
            yield Sample(*known_part, found_shared)
        elif found_shared <= target.shared_per_block:
            made = compile_launch(launch, target)
            if made.ok:
                yield (*known_part, found_shared, made.registers, made.spills)
    except Exception as problem:  # the compiler refuses some tiles
        print(f"\n{known_part}: {str(problem).strip()[:100]}", file=sys.stderr)


def described(draw: Draw, launch: Launch, config: Config) -> tuple[Any, ...]:
    """All of a sample but its number. Blocks are those of the launch: a page or a unit may have cut them."""
    constexprs = launch.constexprs
    assert launch.workload is not None
    listed = kernel_of(launch) in ("forward", "dq", "dkdv") and any("list" in a.name for a in launch.arguments)
    return (
        draw.pattern, launch.name, launch.workload.phase, kernel_of(launch), draw.dtype,
        constexprs["C.QK_DIM"], constexprs["C.V_DIM"], constexprs["C.GROUP"], (constexprs["C.PAGE"] > 0) + listed,
        constexprs["C.BLOCK_M"], constexprs["C.BLOCK_N"], config.num_warps, config.num_stages,
        draw.architecture, triton.__version__,
    )  # fmt: skip


def kernel_of(launch: Launch) -> str:
    """`forward`, `units_dq` and so on as in `KernelShape`; empty for a kernel without a configuration of its own."""
    kind = launch.name.rsplit("_", 1)[-1]
    if kind not in KINDS or "C.BLOCK_M" not in launch.constexprs:
        return ""
    if "U.UNIT" not in launch.constexprs:
        return kind
    return "units" if kind == "forward" else f"units_{kind}"


def launches(draw: Draw, target: Target, configured: Callable[..., Config]) -> list[Launch]:
    """What the pattern's module launches with `configured` in place of the tables."""
    with mock.patch.object(launching, "lookup", configured):
        return survey(loaded(draw.pattern), (draw.dtype,), (draw.dims,), target)


@cache
def loaded(pattern: str) -> ModuleType:
    """`nsa/5` is nsa with 5 query heads for each kv head and open head dims."""
    name, _, group = pattern.partition("/")
    text = (folder("patterns") / f"{name}.spat").read_text(encoding="utf-8")
    if group:
        text = re.sub(r"heads .*", f"heads  query = {2 * int(group)}, kv = 2", text)
        text = re.sub(r"dim .*\n", "", text)
    return spdsl.load(text)


class _AllocatedError(Exception):
    """Ends a compilation where shared memory is known."""


class _Stop:
    def init_targets(self) -> None:
        raise _AllocatedError


def shared(launch: Launch, target: Target) -> int:
    """Bytes of shared memory of one block: Triton's stages up to the translation into LLVM's language."""
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    backend = make_backend(gpu)
    options = backend.parse_options(dict(launch.options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = launch.source(target.backend)
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    module = source.make_ir(gpu, options, functions, modules, context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    metadata = {"target": gpu, **options.__dict__}
    for stage in ("ttir", "ttgir"):
        module = stages[stage](module, metadata)
    with mock.patch(f"{type(backend).__module__}.llvm", _Stop()):
        try:
            stages["llir"](module, metadata)
        except _AllocatedError:
            return int(module.get_int_attr("ttg.shared"))
    raise RuntimeError("triton no longer starts LLVM after it has allocated shared memory")


if __name__ == "__main__":
    main()
