"""`python -m benchmarks.run --suite nsa [--part correctness|times|all] [--lengths N ...] [--dry]`.

As in the GPU suite, cases run in worker processes: out of memory or a crash is a line in the table. `--dry` takes every
step on small shapes, also without a GPU.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from benchmarks.baselines import nsa as peers
from benchmarks.gpu import process
from benchmarks.gpu.patterns import Case
from benchmarks.gpu.suite import RESULTS, at_once, say
from benchmarks.gpu.table import file_name, write_json
from benchmarks.nsa import cases, table

COMPILE_S, CHECK_S, LAST_S = 120.0, 150.0, 440.0  # wall clock: end of compiling, of checking alone, of all
AT_ONCE = 2  # checks at a time: they hold float32 copies of everything


def run(options: argparse.Namespace) -> int:
    """0 when every check passed and every case of ours gave a result."""
    start = time.monotonic()
    checks, times = planned(options)
    workers = 1 if options.dry else options.workers or os.cpu_count() or 1
    counts = [case for case in times if case["kind"] == "nsa_counted"]
    times = [case for case in times if case["kind"] != "nsa_counted"]
    groups = [] if options.dry else cases.warmed(checks + times)
    say(f"{len(groups)} kinds of calls to compile, {len(counts)} counts, {workers} processes at a time")
    found = at_once([[case] for case in counts] + groups, workers, start + COMPILE_S)
    counted = [row for row in found if row["kind"] == "nsa_counted"]
    end = start + LAST_S
    if checks and times:
        end = time.monotonic() + CHECK_S
    say(f"after {time.monotonic() - start:.0f} s: {len(checks)} checks")
    checked = at_once([checks[i::AT_ONCE] for i in range(AT_ONCE)], AT_ONCE, end) if checks else []
    say(f"after {time.monotonic() - start:.0f} s: {len(times)} cases to time")
    timed = process.run(times, start + LAST_S, lambda row: say(table.line(row))) if times else []
    facts = process.device() | peers.found() | {"seconds": round(time.monotonic() - start, 1)}
    results: Case = {"device": facts, "checks": checked, "times": counted + timed}
    path = options.out or RESULTS / f"{file_name(facts)}-nsa.json"
    write(path, results)
    print(table.summary(results))
    print(f"written to {path} and {path.with_suffix('.md')}")
    return 0 if all(good(row) for row in checked + counted + timed) else 1


def planned(options: argparse.Namespace) -> tuple[list[Case], list[Case]]:
    checks = cases.checked(options.dry, options.lengths) if options.part != "times" else []
    times = cases.timed(options.dry, options.lengths) if options.part != "correctness" else []
    return checks, times


def good(row: Case) -> bool:
    """A peer or a dense backend may fail."""
    if row["kind"] in ("nsa_peer", "nsa_dense", "nsa_dense_decode"):
        return True
    return bool(row.get("ok", "failure" not in row and "backward_failure" not in row))


def write(path: Path, results: Case) -> None:
    """`path` gets JSON, `path` with the ending .md the tables."""
    write_json(path, results)
    path.with_suffix(".md").write_text(table.markdown(results), encoding="utf-8")
