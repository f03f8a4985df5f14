"""Results as a table for the terminal, as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import compress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.workload import Workload

Result = dict[str, Any]
# A line of the terminal holds 80 characters; Markdown and JSON have these columns, too.
WIDE = ("again_s",)
COLUMNS = {
    "task": "task",
    "tokens": "tokens",
    "contender": "by",
    "prepare_s": "prepare",
    "again_s": "again",
    "first_s": "first",
    "steady_s": "steady",
    "spread": "spread",
    "ratio": "x ours",
    "peak_mib": "MiB",
    "error": "error",
}


def cells(results: list[Result]) -> Iterator[list[str]]:
    """Text of the rows; `x ours` divides a time by ours of the same task and length."""
    own = {(r["task"], r["tokens"]): total(r) for r in results if r["contender"] == "ours"}
    for result in sorted(results, key=lambda r: (r["task"], r["tokens"])):
        base, mine = own.get((result["task"], result["tokens"])), total(result)
        ratio = mine / base if base and mine else None
        yield [shown(name, (result | {"ratio": ratio, "spread": spread(result)}).get(name)) for name in COLUMNS]


def spread(result: Result) -> float | None:
    """How far apart the quartiles of the calls are, in medians: a quiet machine stays below a tenth."""
    if result.get("calls", 1) < 2:
        return None
    found: float = (result["high_s"] - result["low_s"]) / result["steady_s"]
    return found


def total(result: Result) -> float | None:
    found: float | None = result.get("steady_s", result.get("ready_s"))
    return found


def shown(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name.endswith("_s"):
        return f"{value:.3f} s" if value >= 0.0995 else f"{value * 1e3:.3g} ms"
    if name == "error":
        return f"{value:.1e}"
    if name == "spread":
        return f"{value:.0%}"
    return f"{value:.2f}" if name == "ratio" else f"{value:.0f}" if isinstance(value, float) else str(value)


def print_table(results: list[Result], work: Workload) -> None:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    shown_here = [name not in WIDE for name in COLUMNS]
    for name, text in compress(COLUMNS.items(), shown_here):
        table.add_column(text, justify="left" if name in {"task", "contender"} else "right", no_wrap=True)
    for row in cells(results):
        table.add_row(*compress(row, shown_here))
    Console().print(title(results, work), table, sep="\n", highlight=False)


def title(results: list[Result], work: Workload) -> str:
    one = results[0]
    return (
        f"window {work.window} + sinks {work.sinks}, {work.heads} heads, head_dim {work.head_dim}, batch {work.batch}, "
        f"{work.dtype}; torch {one['torch']}, {one['threads']} threads, {one['instructions']}"
    )


def markdown(results: list[Result], work: Workload) -> str:
    lines = [title(results, work), "", "| " + " | ".join(COLUMNS.values()) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(row) + " |" for row in cells(results)]
    return "\n".join(lines) + "\n"


def write(path: Path, results: list[Result], failed: list[Result], work: Workload) -> None:
    """`path` gets JSON, `path` with the ending .md the table."""
    shape = {"batch": work.batch, "heads": work.heads, "head_dim": work.head_dim, "dtype": work.dtype}
    pattern = {"file": work.pattern, "window": work.window, "sinks": work.sinks}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"shape": shape, "pattern": pattern, "results": results, "failed": failed}, indent=1))
    path.with_suffix(".md").write_text(markdown(results, work))
