"""One case in this process: `python -m benchmarks.cases ours forward 4096` prints one line of JSON.

Times are seconds of the wall clock, memory is MiB. `prepare_s` is what comes before a call (a mask, a module),
`again_s` the same once more, `first_s` the first call with whatever it compiles, `steady_s` the median of later calls,
`low_s` and `high_s` their quartiles. beside: forward next to one process that never waits. decode: one query over a
cache of the causal pattern in pages of 64, or `decode_row` in one row; the other contender has K and V in one piece.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from benchmarks import baselines, workload

Result = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=baselines.NAMES)
    parser.add_argument("task", choices=workload.TASKS)
    parser.add_argument("tokens", type=int)
    parser.add_argument("--suite", default="cpu")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    work = workload.read(options.suite, options.quick)
    result = measure(options.contender, options.task, work, options.tokens)
    head = {"contender": options.contender, "task": options.task, "tokens": options.tokens}
    print(json.dumps(head | result | {"peak_mib": peak_mib()} | conditions()))


def measure(contender: str, task: str, work: workload.Workload, tokens: int) -> Result:
    import_s, _ = timed(lambda: __import__("torch"))
    if task == "plan":
        from benchmarks.plan import plan

        return plan(work, tokens)
    if task in ("decode", "decode_row"):
        from benchmarks import decode

        return decode.measure(contender, work, tokens, None if task == "decode_row" else 64)
    q, k, v, dout = inputs(work, tokens)
    before = peak_mib()
    prepare_s, attend = timed(lambda: baselines.prepare(contender, work, tokens))
    call = (lambda: train(attend, q, k, v, dout)) if task == "train" else (lambda: forward(attend, q, k, v))
    first_s, out = timed(call)
    result: Result = {"import_s": import_s, "prepare_s": prepare_s, "first_s": first_s, "inputs_mib": before}
    result["error"] = error(work, contender, q, k, v, out)
    if task == "ready":
        return result | {"ready_s": prepare_s + first_s}
    result["again_s"], _ = timed(lambda: baselines.prepare(contender, work, tokens))
    with busy_process() if task == "beside" else nullcontext():
        return result | steady(call, first_s, work)


@contextmanager
def busy_process() -> Iterator[None]:
    """One process that wants a core all the time."""
    process = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        yield
    finally:
        process.kill()
        process.wait()


def steady(call: Callable[[], Any], first_s: float, work: workload.Workload) -> Result:
    """The median of later calls; a case whose first call outlasts the budget counts that one call."""
    times: list[float] = []
    while len(times) < work.repeats and first_s + sum(times) < work.seconds:
        times.append(timed(call)[0])
    times = times or [first_s]
    low, _, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    spread = {"low_s": low, "high_s": high, "fastest_s": min(times), "slowest_s": max(times)}
    return {"steady_s": statistics.median(times), "calls": len(times)} | spread


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


def inputs(work: workload.Workload, tokens: int) -> list[Any]:
    """q, k, v and the gradient of the output, standard normal, the same in every process."""
    import torch

    torch.manual_seed(0)
    shape = (work.batch, work.heads, tokens, work.head_dim)
    return [torch.randn(shape, dtype=getattr(torch, work.dtype)) for _ in range(4)]


def forward(attend: baselines.Attend, q: Any, k: Any, v: Any) -> Any:
    import torch

    with torch.no_grad():
        return attend(q, k, v)


def train(attend: baselines.Attend, q: Any, k: Any, v: Any, dout: Any) -> Any:
    """Forward, then the gradients of q, k and v."""
    import torch

    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    torch.autograd.grad(out, leaves, dout)
    return out.detach()


def error(work: workload.Workload, contender: str, q: Any, k: Any, v: Any, out: Any, rows: int = 64) -> float:
    """The largest difference to a dense float64 softmax, in the last rows: a fast wrong answer is no answer."""
    import torch

    tokens = q.shape[2]
    i, j = torch.arange(tokens - rows, tokens).unsqueeze(1), torch.arange(tokens)
    window = tokens if contender == "sdpa" else work.window
    hidden = (j > i) | ((i - j >= window) & (j >= work.sinks))
    worst = 0.0
    for head in range(work.heads):  # one head at a time: the check must not set the peak of the memory
        scores = work.scale * q[0, head, -rows:].double() @ k[0, head].double().T
        want = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[0, head].double()
        worst = max(worst, (out[0, head, -rows:] - want).abs().max().item())
    return worst


def peak_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return float(peak) / (2**20 if platform.system() == "Darwin" else 2**10)


def conditions() -> Result:
    import torch

    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    main()
