"""Cases in a worker process that is started anew when one of them breaks it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO

from benchmarks.gpu.patterns import Case

LONGEST = 120.0  # seconds of one case


def run(cases: list[Case], deadline: float, seen: Callable[[Case], None]) -> list[Case]:
    """A row for every case; those after the deadline say so."""
    rows: list[Case] = []
    while len(rows) < len(cases) and time.monotonic() < deadline:
        left = cases[len(rows) :]
        count = 0
        for row in answers(left, deadline):
            rows.append(row)
            seen(row)
            count += 1
        if count < len(left) and time.monotonic() < deadline and not _ended_cleanly(rows, count):
            lost = left[count] | {"failure": f"the process ended or took over {LONGEST:.0f} s"}
            rows.append(lost)
            seen(lost)
    return rows + [case | {"failure": "not reached: the phase's time was spent"} for case in cases[len(rows) :]]


def _ended_cleanly(rows: list[Case], count: int) -> bool:
    """The worker answered its last case, found the device unusable and ended: the next one is not to blame."""
    return count > 0 and bool(rows[-1].get("last"))


def answers(cases: list[Case], deadline: float) -> Iterator[Case]:
    """The rows of one worker, until it ends, hangs or the time is up."""
    command = [sys.executable, "-m", "benchmarks.gpu.worker"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            worker.stdin.write("".join(json.dumps(case) + "\n" for case in cases))
            worker.stdin.close()
            for _ in cases:
                line = read_line(worker.stdout, min(deadline - time.monotonic(), LONGEST))
                if not line:
                    return
                yield json.loads(line)
        except BrokenPipeError:
            return
        finally:
            worker.kill()


def read_line(stream: IO[str], seconds: float) -> str:
    """A line, or nothing at the end of the stream or of the time."""
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.append(stream.readline()), daemon=True)
    reader.start()
    reader.join(max(0.0, seconds))
    return found[0] if found else ""


def device() -> Case:
    """The device and its clocks, read after the run; nothing is set."""
    code = (
        "import json, torch, triton; c = torch.cuda.is_available(); "
        "print(json.dumps({'name': torch.cuda.get_device_name() if c else 'cpu', "
        "'torch': torch.__version__, 'triton': triton.__version__}))"
    )
    facts: Case = json.loads(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )
    wanted = "clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu,driver_version"
    try:
        query = ["nvidia-smi", f"--query-gpu={wanted}", "--format=csv,noheader"]
        text = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return facts
    return facts | dict(zip(wanted.split(","), map(str.strip, text.strip().splitlines()[0].split(",")), strict=False))
