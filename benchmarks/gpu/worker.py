"""Runs the cases that come as JSON lines on standard input; one JSON line out for each, whatever happens.

Ends with 3 once the device is unusable: what follows needs a fresh process.
"""

from __future__ import annotations

import json
import sys
import time

import torch

from benchmarks.gpu import clock, configs, numerics, timing
from benchmarks.gpu.patterns import Case
from benchmarks.nsa import checks
from benchmarks.nsa import timing as nsa

RUN = {
    "numerics": numerics.numerics,
    "cached": numerics.cached,
    "graph": timing.graph,
    "ceilings": timing.ceilings,
    "ours": timing.ours,
    "flex": timing.flex,
    "sdpa": timing.sdpa,
    "decode": timing.decode,
    "sdpa_decode": timing.sdpa_decode,
    "config": configs.config,
    "nsa_attended": checks.attended,
    "nsa_selected": checks.selected,
    **{f"nsa_{name}": function for name, function in nsa.KINDS.items()},
}


def main() -> int:
    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print must not mix with the answers
    for line in sys.stdin:
        case = json.loads(line)
        row = run(case)
        row["last"] = not usable()
        answers.write(json.dumps(row) + "\n")
        answers.flush()
        if row["last"]:
            return 3
    return 0


def run(case: Case) -> Case:
    start = time.perf_counter()
    try:
        found = RUN[case["kind"]](case)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as problem:  # a panic inside a compiler is no Exception
        text = str(problem).strip().splitlines() or ["no message"]
        found = {"failure": f"{type(problem).__name__}: {text[0][:300]}"}
    if usable() and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return case | found | {"seconds": round(time.perf_counter() - start, 2)}


def usable() -> bool:
    try:
        clock.synchronize()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
