"""Tuned against default configurations: every kernel of some patterns, at some lengths, on the GPU of this machine."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console

import spdsl
from spdsl.machine.tune import Sizes, table, tune_file
from spdsl.machine.tune import rows as rows_of

PATTERNS = Path(__file__).parents[1] / "patterns"
CASES: dict[str, tuple[dict[str, int], Sizes]] = {
    "causal": ({}, Sizes(heads=32, kv_heads=8, dim=128)),
    "sliding_window": ({"window": 4096}, Sizes(heads=32, kv_heads=8, dim=128)),
    "streaming_llm": ({}, Sizes(heads=32, kv_heads=8, dim=128)),
    "document": ({}, Sizes(heads=32, kv_heads=8, dim=64)),
    "nsa": ({}, Sizes()),
}
LENGTHS = [8192, 32768]


def run(options: argparse.Namespace) -> int:
    """0 when every pattern was tuned. Prints one table for each; `options.out` takes all rows as JSON."""
    console = Console()
    rows: list[dict[str, Any]] = []
    failed = 0
    with TemporaryDirectory() as folder:
        for name, (params, sizes) in CASES.items():
            path = Path(folder) / f"{name}.py"
            path.write_text(spdsl.compile(PATTERNS / f"{name}.spat", **params).text)
            try:
                found = tune_file(
                    path, LENGTHS[: 1 if options.quick else None], [], sizes, path.with_suffix(".tuned.json")
                )
            except (RuntimeError, ValueError) as error:
                console.print(f"[red]failed:[/] {name}: {error}", highlight=False)
                failed += 1
                continue
            console.print(f"[bold]{name}[/]", table(found))
            rows += [{"pattern": name, **row} for row in rows_of(found)]
    gains = [row["default"] / row["milliseconds"] for row in rows if row["milliseconds"]]
    if gains:
        console.print(
            f"median gain {statistics.median(gains) - 1:.1%}, largest {max(gains) - 1:.1%}, {len(gains)} kernels"
        )
    if options.out and rows:
        gpu = torch.cuda.get_device_name()
        options.out.write_text(json.dumps({"gpu": gpu, "torch": torch.__version__, "kernels": rows}, indent=1) + "\n")
    return 1 if failed or not rows else 0
