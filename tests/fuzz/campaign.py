"""`python -m tests.fuzz.campaign --minutes 60 [--seed 0] [--corpus FOLDER] [--out FILE]`: sources until the time is up.

Cases are numbered from the seed on, so a run goes on where another one ended (`--seed` of its last line plus one). A
line of JSON with the counts comes every five minutes and at the end; a case that fails is made smaller and printed.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.examine import Finding, examine
from tests.fuzz.growth import Growth
from tests.fuzz.mutations import Mutations, corpus
from tests.fuzz.programs import Programs

ADDRESS_SPACE = 8 * 2**30  # a case that asks for more ends in a MemoryError instead of the machine
REPORT_SECONDS = 300.0
SMALLER_SECONDS = 60.0  # spent on making one failing case smaller
SHOWN = 3000  # characters of a failing case


def source(number: int, sources: list[str]) -> tuple[str, str]:
    """(kind, text) of one case."""
    kind = ("program", "mutation", "program", "mutation", "growth")[number % 5]
    if kind == "program":
        return kind, Programs(number).source()
    return kind, (Mutations(number, sources) if kind == "mutation" else Growth(number)).source()


@dataclass
class Counts:
    """What a run has seen so far."""

    first: int
    last: int = -1
    outcomes: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    compiled: int = 0
    slowest: dict[str, tuple[float, int]] = field(default_factory=dict)
    largest: tuple[float, int] = (0.0, -1)
    failures: list[int] = field(default_factory=list)

    def add(self, number: int, kind: str, finding: Finding) -> None:
        self.last = number
        self.kinds[kind] += 1
        self.outcomes[finding.outcome if finding.outcome in ("valid", "wrong") else "refused"] += 1
        self.compiled += "compile" in finding.seconds
        for what, seconds in finding.seconds.items():
            self.slowest[what] = max(self.slowest.get(what, (0.0, -1)), (round(seconds, 3), number))
        self.largest = max(self.largest, (round(finding.megabytes, 1), number))
        if finding.wrong:
            self.failures.append(number)

    def line(self, started: float) -> str:
        return json.dumps({
            "cases": sum(self.kinds.values()), "seeds": [self.first, self.last], "kinds": self.kinds,
            "outcomes": self.outcomes, "compiled": self.compiled,
            "slowest_seconds_and_seed": self.slowest, "most_megabytes_and_seed": self.largest,
            "failures": self.failures[:50], "number_of_failures": len(self.failures),
            "cpu_seconds": round(time.process_time()), "wall_seconds": round(time.monotonic() - started),
        })  # fmt: skip


def smaller(text: str, compiles: bool) -> str:
    """A shorter source that still fails in the same way, found by leaving out parts."""
    end, part = time.monotonic() + SMALLER_SECONDS, max(1, len(text) // 2)
    how = _way(examine(text, compiles))
    while part and time.monotonic() < end:
        place = 0
        while place < len(text) and time.monotonic() < end:
            shorter = text[:place] + text[place + part :]
            if _way(examine(shorter, compiles)) == how:
                text = shorter
            else:
                place += part
        part //= 2
    return text


def _way(finding: Finding) -> tuple[str, str]:
    """What fails, and the last line of how; times are one way."""
    if not finding.wrong:
        return "", ""
    lines = finding.wrong[0].strip().splitlines()
    late = " s" in lines[0]
    return lines[0].split(":")[0], "late" if late else lines[-1][:60]


def run(first: int, end: float, sources: list[str], reduces: bool = True) -> Counts:
    counts, started, told = Counts(first), time.monotonic(), time.monotonic()
    number = first
    while time.monotonic() < end:
        kind, text = source(number, sources)
        compiles = number % 10 < 2
        finding = examine(text, compiles, fixes=number % 7 == 0)
        counts.add(number, kind, finding)
        if finding.wrong:
            shown = smaller(text, compiles) if reduces else text
            print(f"--- seed {number} ({kind}):", *finding.wrong, shown[:SHOWN], sep="\n", flush=True)
        if time.monotonic() - told > REPORT_SECONDS:
            told = time.monotonic()
            print(counts.line(started), flush=True)
        number += 1
        if number % 500 == 0:
            gc.collect()
    print(counts.line(started), flush=True)
    return counts


def main() -> int:
    """0 when no case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--corpus", type=Path, help="a folder with further .spat files to mutate")
    parser.add_argument("--whole", action="store_true", help="print failing cases as they are")
    parser.add_argument("--show", type=int, metavar="SEED", help="print one case and what comes of it")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    sources = corpus(options.corpus)
    if options.show is not None:
        kind, text = source(options.show, sources)
        print(kind, text, examine(text, compiles=True, fixes=True), sep="\n")
        return 0
    examine(sources[0], compiles=True)  # the first one makes the parser
    return 1 if run(options.seed, time.monotonic() + 60 * options.minutes, sources, not options.whole).failures else 0


if __name__ == "__main__":
    sys.exit(main())
