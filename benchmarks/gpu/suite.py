"""`python -m benchmarks.run --suite gpu`: compile and check in many processes, then time in one.

No process of the suite itself uses the device, so that nothing a kernel does can end the run. `--tiny` runs every
step on small shapes, also without a GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.gpu import cases, process, table
from benchmarks.gpu.patterns import Case

CHECK_S, TIME_S = 190.0, 240.0  # wall clock of the two phases; with start-up under 8 minutes
RESULTS = Path(__file__).parents[1] / "results"


def run(options: argparse.Namespace) -> int:
    """0 when every case gave a result and every check passed."""
    start = time.monotonic()
    workers = options.workers or (os.cpu_count() or 1)
    if options.configs:
        return tune(options, workers)
    timed = cases.timed(options.quick, options.tiny)
    groups = [*cases.numeric(options.quick, options.tiny), *cases.warmed(timed)]
    say(f"{len(groups)} processes, {workers} at a time: numerics and compilation")
    checked = at_once(groups, workers, start + CHECK_S)
    checks = [row for row in checked if not row.get("once")]
    say(f"after {time.monotonic() - start:.0f} s: {len(timed)} cases to time")
    rows = process.run(timed, time.monotonic() + TIME_S, lambda row: say(table.line(row)))
    facts = process.device() | {"seconds": round(time.monotonic() - start, 1)}
    results: Case = {"device": facts, "checks": checks, "times": rows}
    path = options.out or RESULTS / f"{table.file_name(facts)}.json"
    table.write(path, results)
    print(table.summary(results))
    print(f"written to {path} and {path.with_suffix('.md')}")
    return 0 if all(row.get("ok", "failure" not in row) for row in checks + rows) else 1


def tune(options: argparse.Namespace, workers: int) -> int:
    """The best configurations of the chosen kernels for one shape."""
    params = {name: int(value) for name, value in (item.split("=") for item in options.param)}
    tried = cases.tried(options.pattern, params, options.dim, 256 if options.tiny else options.tokens, options.configs)
    tried = tried[:4] if options.tiny else tried
    end = time.monotonic()
    at_once([[case] for case in (group[0] for group in cases.warmed(tried))], workers, end + CHECK_S)
    rows = process.run(tried, time.monotonic() + TIME_S, lambda row: None)
    for kernel in options.configs:
        print(table.best([row for row in rows if row["kernel"] == kernel]))
    if options.out:
        table.write_json(options.out, {"device": process.device(), "times": rows})
    return 0 if all("failure" not in row for row in rows) else 1


def at_once(groups: list[list[Case]], workers: int, deadline: float) -> list[Case]:
    """Every group in a process of its own."""
    quiet: Callable[[Case], None] = lambda row: say(table.line(row)) if "failure" in row else None  # noqa: E731
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda group: process.run(group, deadline, quiet), groups)
        return [row for rows in found for row in rows]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
