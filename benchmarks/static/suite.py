"""`python -m benchmarks.run --suite static`: the machine code of our kernels and of others, side by side; no GPU.

One kernel of each form and pattern, or with `--all` every one of all phases, dtypes and dims. Others: FlexAttention's
templates are those of the installed torch, fla is taken where it is installed, and every folder of `--peers` is looked
at. Results are kept in the file of results by digest: what has not changed is not compiled again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console

from benchmarks.static import kept, others, table
from benchmarks.static.compile import Compiled, compiled
from benchmarks.static.demand import TOKENS
from benchmarks.static.ours import Kernel, kernels, sources
from benchmarks.static.rows import Row, as_dict, from_data
from spdsl import targets
from spdsl.machine.record import refuse_interpreter
from spdsl.targets import Target

RESULTS = Path(__file__).parents[1] / "results" / "static.json"
TARGET = "h200"
TERMS = {"fp32": 3}  # products of tf32 that one of float32 becomes
console = Console(stderr=True)


def run(options: argparse.Namespace) -> int:
    """0 when every kernel compiled. RuntimeError under TRITON_INTERPRET."""
    refuse_interpreter()
    start, target, path = time.monotonic(), targets.find(TARGET), options.out or RESULTS
    before = kept.read(path)
    rows = [from_data(row) for row in before.get("rows", ())]
    digest = kept.digest_of(kept.everything(), *sources().values(), str(options.all))
    own = [row for row in rows if row.of == "ours"]
    if before.get("ours") != digest:
        own = list(ours(own, target, options.all))
    found = [*own, *others.beside(own, others.rows(rows, options.peers, target, console))]
    write(
        path,
        {"form": kept.FORM, "versions": versions(), "target": TARGET, "tokens": TOKENS, "ours": digest},
        found,
        target,
    )
    bad = [row for row in found if row.error]
    for row in bad:
        console.print(f"[red]failed:[/] {row.of} {row.pattern} {row.kernel}: {row.error}", highlight=False)
    console.print(f"{len(found)} kernels in {time.monotonic() - start:.0f} s: {path} and {path.with_suffix('.md')}")
    return 1 if bad else 0


def versions() -> dict[str, str]:
    return {"triton": triton.__version__, "ptxas": kept.assembler(), "torch": torch.__version__}


def ours(before: Sequence[Row], target: Target, every: bool) -> Iterator[Row]:
    """Every kernel once, with the patterns that have it; those whose digest is kept are not compiled."""
    wanted: list[Kernel] = []
    for name, text in sources().items():
        console.print(f"[dim]recording {name}", highlight=False)
        wanted += kernels(name, text, target, every)
    codes = {row.digest: Compiled(row.code) for row in before if row.code}
    codes |= compiled([one for one in wanted if one.digest not in codes], target, console)
    groups: dict[str, list[Kernel]] = {}
    for one in wanted:
        groups.setdefault(one.digest, []).append(one)
    for digest, group in groups.items():
        yield _row(group, codes[digest])


def _row(group: Sequence[Kernel], made: Compiled) -> Row:
    """Of equal kernels the first one that multiplies pairs stands for the others."""
    first = next((one for one in group if one.demand), group[0])
    workload = first.launch.workload
    assert workload is not None
    return Row(
        "ours", first.pattern, first.launch.name, first.heads, (workload.qk_dim, workload.v_dim), workload.dtype,
        workload.phase, first.digest,
        also=tuple(dict.fromkeys(one.pattern for one in group if one.pattern != first.pattern)),
        per_pair=first.demand.per_pair * TERMS.get(workload.dtype, 1) if first.demand else 0,
        code=made.code, demand=first.demand, error=made.error,
    )  # fmt: skip


def write(path: Path, head: dict[str, Any], found: Sequence[Row], target: Target) -> None:
    """`path` gets JSON, a row on each line, `path` with the ending .md the tables."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(as_dict(row)) for row in found)
    path.write_text(f'{json.dumps(head)[:-1]}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")
    path.with_suffix(".md").write_text(table.markdown(found, head["versions"], target), encoding="utf-8")
