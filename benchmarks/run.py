"""`python -m benchmarks.run --suite cpu|gpu|nsa|static|tune [--quick] [--out FILE]`.

cpu: every case in turn, each in its own process. gpu: benchmarks/gpu/suite.py. nsa: benchmarks/nsa/suite.py.
static: machine code of our kernels and of others, without a GPU, benchmarks/static/suite.py.
tune: tuned against default configurations, benchmarks/tune.py; all others run with the default ones.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from benchmarks import report, workload
from spdsl.cli import numbers

SUITES = ("cpu", "gpu", "nsa", "static", "tune")
Result = dict[str, Any]
console = Console(stderr=True)


def main() -> int:
    """0 when every case gave a result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", choices=SUITES, default="cpu")
    parser.add_argument("--quick", action="store_true", help="the shortest length and fewer calls")
    parser.add_argument("--out", type=Path, help="JSON; the table goes beside it as Markdown")
    parser.add_argument("--only", nargs="+", help="cpu: contenders to run")
    add_gpu_options(parser)
    add_nsa_options(parser)
    add_static_options(parser)
    options = parser.parse_args()
    if options.suite == "tune":
        from benchmarks import tune

        return tune.run(options)
    os.environ.setdefault("SPDSL_TUNE", "off")
    if options.suite == "gpu":
        from benchmarks.gpu import suite

        return suite.run(options)
    if options.suite == "nsa":
        from benchmarks.nsa import suite as nsa

        return nsa.run(options)
    if options.suite == "static":
        from benchmarks.static import suite as static

        return static.run(options)
    work = workload.read(options.suite, options.quick)
    results: list[Result] = []
    failed: list[Result] = []
    for case in cases(work, options.only):
        console.print("[dim]" + " ".join(map(str, case)))
        found = run(case, options.suite, options.quick, work.timeout)
        (failed if "failure" in found else results).append(found)
    if results:
        report.print_table(results, work)
    for case_failed in failed:
        console.print(f"[red]failed:[/] {case_failed}", markup=True, highlight=False)
    if options.out and results:
        report.write(options.out, results, failed, work)
    return 1 if failed or not results else 0


def add_gpu_options(parser: argparse.ArgumentParser) -> None:
    gpu = parser.add_argument_group("gpu")
    gpu.add_argument("--tiny", action="store_true", help="every step on small shapes; runs without a GPU")
    gpu.add_argument("--workers", type=int, help="processes that compile and check; by default one per core")
    gpu.add_argument(
        "--configs", nargs="+", choices=["forward", "dq", "dkdv"], help="instead: try configurations of these kernels"
    )
    gpu.add_argument("--pattern", default="causal", help="with --configs")
    gpu.add_argument("--param", nargs="*", default=[], metavar="NAME=VALUE", help="with --configs")
    gpu.add_argument("--tokens", type=numbers.tokens, default=32768, help="with --configs")
    gpu.add_argument("--dim", type=int, default=128, help="with --configs")


def add_nsa_options(parser: argparse.ArgumentParser) -> None:
    nsa = parser.add_argument_group("nsa")
    nsa.add_argument("--part", choices=["correctness", "times", "all"], default="all")
    nsa.add_argument("--lengths", type=numbers.tokens, nargs="+", help="such as 8k 32k 64k 128k, the default")
    nsa.add_argument("--dry", action="store_true", help="every step on small shapes; runs without a GPU")


def add_static_options(parser: argparse.ArgumentParser) -> None:
    static = parser.add_argument_group("static")
    static.add_argument("--all", action="store_true", help="every kernel of all phases, dtypes and head dims")
    static.add_argument("--peers", type=Path, nargs="+", default=[], help="folders with kernels of others, or of such")


def cases(work: workload.Workload, only: list[str] | None) -> Iterator[tuple[str, str, int]]:
    """(contender, task, tokens), the contenders of a task and length next to each other."""
    chosen = {name: tasks for name, tasks in work.tasks.items() if not only or name in only}
    for task in ("forward", "train"):
        for tokens in work.tokens:
            yield from ((name, task, tokens) for name, tasks in chosen.items() if task in tasks)
    for task, tokens in (
        ("beside", work.beside_tokens),
        ("decode", work.decode_tokens),
        ("decode_row", work.decode_tokens),
    ):
        yield from ((name, task, tokens) for name, tasks in chosen.items() if task in tasks)
    yield from ((name, "ready", work.tokens[0]) for name, tasks in chosen.items() if "ready" in tasks)
    yield from ((name, "plan", work.plan_tokens) for name, tasks in chosen.items() if "plan" in tasks)


def run(case: tuple[str, str, int], suite: str, quick: bool, timeout: float) -> Result:
    """The case's line of JSON, or what went wrong under `failure`."""
    contender, task, tokens = case
    command = [sys.executable, "-m", "benchmarks.cases", contender, task, str(tokens), "--suite", suite]
    command += ["--quick"] * quick
    failure: Result = {"contender": contender, "task": task, "tokens": tokens}
    try:
        with TemporaryDirectory() as cold:  # every case compiles anew, so that first calls are comparable
            caches = {"TORCHINDUCTOR_CACHE_DIR": f"{cold}/inductor", "XDG_CACHE_HOME": f"{cold}/cache"}
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=timeout, check=False, env=os.environ | caches
            )
    except subprocess.TimeoutExpired:
        return failure | {"failure": f"longer than {timeout:.0f} s"}
    if done.returncode:
        return failure | {"failure": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    result: Result = json.loads(done.stdout.strip().splitlines()[-1])
    return result


if __name__ == "__main__":
    sys.exit(main())
