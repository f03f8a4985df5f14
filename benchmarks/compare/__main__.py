"""`python -m benchmarks.compare results OLD NEW` and `... reports OLD NEW`. Ends with 1 if something is worse."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.compare import reports, results


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    commands = parser.add_subparsers(required=True)
    numbers = commands.add_parser("results", help="numbers of all patterns and phases, bit by bit")
    numbers.add_argument("old", type=Path, help="a checkout")
    numbers.add_argument("new", type=Path, help="a checkout")
    numbers.add_argument("--pattern", action="append", default=[], help="only this one; may be given again")
    numbers.add_argument("--interpreted", action="store_true", help="kernels in Triton's interpreter, not the CPU path")
    numbers.set_defaults(run=compare_results)
    kernels = commands.add_parser("reports", help="registers, spills, shared memory and products of kernels")
    kernels.add_argument("old", type=Path, help="JSON of `spdsl compile --report --format json`")
    kernels.add_argument("new", type=Path)
    kernels.set_defaults(run=compare_reports)
    options = parser.parse_args()
    return int(options.run(options))


def compare_results(options: argparse.Namespace) -> bool:
    worse = False
    old, new = options.old.resolve(), options.new.resolve()
    for name, tensors, differences in results.compare(old, new, options.pattern, options.interpreted):
        print(f"{name}: {tensors} tensors, {len(differences)} differ", flush=True)
        for x in differences:
            print(f"  {x.tensor}: error {x.old:.2e} -> {x.new:.2e}{'  WORSE' if x.worse else ''}", flush=True)
            worse |= x.worse
    return worse


def compare_reports(options: argparse.Namespace) -> bool:
    lines = reports.compare(options.old.read_text(), options.new.read_text())
    print("\n".join(x.text for x in lines) or "nothing differs")
    return any(x.worse for x in lines)


if __name__ == "__main__":
    raise SystemExit(main())
