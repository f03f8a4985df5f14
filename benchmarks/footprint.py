"""Samples of the shared memory that Triton gives generated kernels, for spdsl/device/footprint_terms.py.

    python -m benchmarks.footprint --count 2000 --output benchmarks/results/footprint/shared.csv
    python -m benchmarks.footprint --registers --count 150 --output benchmarks/results/footprint/registers.csv

Draws kernels, configurations and targets at random with a fixed seed, lets Triton allocate shared memory (no assembler
is needed for that), and appends one line for each to a CSV file; what the file has already is not made again. With
--registers kernels that fit are assembled, too, and the last columns are registers and spills.
"""

from __future__ import annotations

import argparse
import csv
import random
import re
import sys
from collections.abc import Iterator
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
from spdsl.device.configs import Config
from spdsl.resources import folder
from spdsl.runtime.crosscompile import compile_launch
from spdsl.runtime.launches import Launch
from spdsl.runtime.survey import survey
from spdsl.targets import Target

SEED = 2026
ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
WEIGHTS = (4, 1, 5, 5, 4)
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
DIMS = ((16, 16), (24, 24), (32, 32), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
# causal and streaming_llm: ranges; document: lists and tensors that are read; alibi: a bias
RANGES = ("causal", "causal", "streaming_llm", "streaming_llm", "document", "document", "alibi", "alibi")
OTHERS = ("sink_attention", "block_sparse", "big_bird", "dilated", "prefix_lm", "longformer", "sparse_transformer")
GROUPS = (1, 2, 5, 8, 16)  # of nsa; its blocks of 64 keys bound those of the kernels
KINDS = ("forward", "dq", "dkdv", "decode", "select")
MOST_REGISTERS = 384  # of a thread for one accumulator: beyond it nobody looks, and compiling takes minutes


class Draw(NamedTuple):
    """What one sample is drawn for: a kernel of a pattern by a random number, since patterns differ in theirs."""

    pattern: str
    pick: int
    dtype: str
    dims: tuple[int, int]
    config: Config
    architecture: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--registers", action="store_true")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    known = {sample[:-1] for sample, _ in read(options.output)} if options.output.exists() else set()
    seed = options.seed + options.registers
    with options.output.open("a", newline="") as file:
        writer = csv.writer(file)
        if not known:
            writer.writerow((*Sample._fields, *(Assembled._fields if options.registers else ())))
        for number, draw in enumerate(draws(seed, options.count)):
            for row in taken(draw, known, options.registers):
                writer.writerow(row)
                file.flush()
            print(f"\r{number + 1} of {options.count}", end="", file=sys.stderr, flush=True)


def draws(seed: int, count: int) -> Iterator[Draw]:
    chance = random.Random(seed)
    while count:
        draw = Draw(
            pattern=chance.choice((*RANGES, chance.choice(OTHERS), *(f"nsa/{g}" for g in GROUPS))),
            pick=chance.randrange(1 << 16),
            dtype=chance.choice(tuple(DTYPES)),
            dims=chance.choice(DIMS),
            config=Config(*(chance.choice(x) for x in ((16, 32, 64, 128), (16, 32, 64, 128), (4, 4, 8), (1, 2, 3, 4)))),
            architecture=chance.choices(ARCHITECTURES, WEIGHTS)[0],
        )
        if plausible(draw):
            count -= 1
            yield draw


def plausible(draw: Draw) -> bool:
    """Small enough for anybody to try."""
    config, dim, size = draw.config, max(draw.dims), DTYPES[draw.dtype]
    threads = config.num_warps * (64 if draw.architecture.startswith("gfx") else 32)
    return max(config.block_m, config.block_n) * dim * size // 2 <= MOST_REGISTERS * threads


def taken(draw: Draw, known: set[tuple[Any, ...]], registers: bool) -> Iterator[tuple[Any, ...]]:
    """The sample of a draw, unless it is known."""
    target = targets.find(draw.architecture)
    found = [launch for launch in launches(draw, target) if kernel_of(launch)]
    kinds = sorted({kernel_of(launch) for launch in found})
    of_kind = [launch for launch in found if kernel_of(launch) == kinds[draw.pick % len(kinds)]]
    launch = of_kind[draw.pick // len(kinds) % len(of_kind)]
    known_part = described(draw, launch)
    if known_part in known:
        return
    known.add(known_part)
    try:
        found_shared = shared(launch, target)
        if not registers:
            yield Sample(*known_part, found_shared)
        elif found_shared <= target.shared_per_block:
            made = compile_launch(launch, target)
            if made.ok:
                yield (*known_part, found_shared, made.registers, made.spills)
    except Exception as problem:  # the compiler refuses some tiles
        print(f"\n{known_part}: {str(problem).strip()[:100]}", file=sys.stderr)


def described(draw: Draw, launch: Launch) -> tuple[Any, ...]:
    """All of a sample but its number. Blocks are those of the launch: a page or a unit may have cut them."""
    constexprs = launch.constexprs
    assert launch.workload is not None
    listed = kernel_of(launch) in ("forward", "dq", "dkdv") and any("list" in a.name for a in launch.arguments)
    return (
        draw.pattern, launch.name, launch.workload.phase, kernel_of(launch), draw.dtype,
        constexprs["C.QK_DIM"], constexprs["C.V_DIM"], constexprs["C.GROUP"], (constexprs["C.PAGE"] > 0) + listed,
        constexprs["C.BLOCK_M"], constexprs["C.BLOCK_N"], draw.config.num_warps, draw.config.num_stages,
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


def launches(draw: Draw, target: Target) -> list[Launch]:
    """What the pattern's module launches with the draw's configuration for every kernel."""
    module = loaded(draw.pattern)
    with mock.patch.object(module, "lookup", return_value=draw.config):
        return survey(module, (draw.dtype,), (draw.dims,), target)


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
