"""Results as a table for the terminal, as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.workload import Workload

Result = dict[str, Any]
COLUMNS = {
    "task": "task",
    "tokens": "tokens",
    "contender": "contender",
    "prepare_s": "prepare",
    "again_s": "again",
    "first_s": "first call",
    "steady_s": "steady",
    "ratio": "x ours",
    "peak_mib": "peak MiB",
    "error": "max error",
}


def cells(results: list[Result]) -> Iterator[list[str]]:
    """Text of the rows; `x ours` divides a time by ours of the same task and length."""
    own = {(r["task"], r["tokens"]): total(r) for r in results if r["contender"] == "ours"}
    for result in sorted(results, key=lambda r: (r["task"], r["tokens"])):
        base, mine = own.get((result["task"], result["tokens"])), total(result)
        ratio = mine / base if base and mine else None
        yield [shown(name, (result | {"ratio": ratio}).get(name)) for name in COLUMNS]


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
    return f"{value:.2f}" if name == "ratio" else f"{value:.0f}" if isinstance(value, float) else str(value)


def print_table(results: list[Result], work: Workload) -> None:
    table = Table(title=title(results, work))
    for name, text in COLUMNS.items():
        table.add_column(text, justify="left" if name in {"task", "contender"} else "right")
    for row in cells(results):
        table.add_row(*row)
    Console().print(table)


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
