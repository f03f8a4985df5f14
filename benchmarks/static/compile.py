"""Compiling kernels of ours and reading their code, on all cores, those that are kept left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from benchmarks.static.code import Code, read
from benchmarks.static.ours import Kernel
from spdsl.machine.crosscompile import built
from spdsl.machine.launches import Launch
from spdsl.machine.machine_code import dump
from spdsl.machine.processes import each
from spdsl.machine.report import bar
from spdsl.targets import Target


@dataclass(frozen=True, slots=True)
class Compiled:
    code: Code | None
    error: str = ""


def code_of(launch: Launch, target: Target) -> Code:
    """Raises what the compilers raise."""
    made = built(launch, target)
    sass, registers, _ = dump(made.asm["cubin"])
    known = made.metadata
    return read(sass, made.asm["ttgir"], registers, known.shared, known.num_warps, known.num_stages, target)


def compiled(kernels: Sequence[Kernel], target: Target, console: Console | None = None) -> dict[str, Compiled]:
    """By digest. What the compilers refuse has its last words under `error`."""
    first = list({kernel.digest: kernel for kernel in reversed(kernels)}.values())

    def work(index: int) -> Compiled:
        try:
            return Compiled(code_of(first[index].launch, target))
        except Exception as problem:
            return Compiled(None, f"{type(problem).__name__}: {problem}".strip().splitlines()[-1])

    found = {}
    with bar(console) as progress:
        task = progress.add_task("compiling", total=len(first))
        for index, one in each(work, lambda _: Compiled(None, "the compiler ended its process"), len(first)):
            kernel = first[index]
            found[kernel.digest] = one
            progress.update(task, advance=1, description=f"{kernel.pattern} {kernel.launch.name}", refresh=True)
    return found
