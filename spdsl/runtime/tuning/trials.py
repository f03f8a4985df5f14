"""One configuration on trial: its time on the device, and whether its results are those of the default."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from spdsl.runtime.tiles.combine import Splits
from spdsl.runtime.tuning.configs import Config

_FLUSH_BYTES = 256 << 20  # more than any L2 cache; as triton.testing.do_bench does
_ENOUGH_MS, _MOST_RUNS = 50.0, 25
# fp32 products may be tf32, of 10 bits; sums of fp64 in another order differ by more than one rounding.
_EPS = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-10, torch.float64: 2.0**-40}
_OTHER_ROWS = 0.01  # of lists: units with nearly the same score change places when sums have another order
_PIECE = 1 << 24  # elements that are compared at a time


def milliseconds(run: Callable[[], object], most: float = math.inf) -> float:
    """The median of a few calls on the device, each after a write that empties the L2 cache.

    The writes last until the host has queued the call, so that its own time does not count. A call that takes twice as
    long as `most` is not repeated.
    """
    run()  # compiles
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    first, start, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    times: list[float] = []
    writes = 1
    while len(times) < 3 or (sum(times) < _ENOUGH_MS and len(times) < _MOST_RUNS):
        torch.cuda.synchronize()
        first.record()
        for _ in range(writes):
            flush.zero_()
        start.record()
        began = time.perf_counter()
        run()
        host = time.perf_counter() - began
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
        writes = min(64, 1 + math.ceil(writes * host * 1e3 / max(first.elapsed_time(start), 1e-3)))
        if times[0] > 2 * most:
            break
    return statistics.median(times[1:] or times)  # the first one was queued behind too few writes


def difference(wanted: object, found: object) -> str:
    """What is wrong with `found`, the results of a candidate; empty if nothing is.

    Another tile adds in another order and rounds the weights at another maximum: one rounding to the dtype each, in
    `wanted` as in `found`. So numbers may differ by two, measured at the largest; NaN and infinities stay in place.
    """
    return next(
        (text for pair in zip(tensors_of(wanted), tensors_of(found), strict=True) if (text := _wrong(*pair))), ""
    )


def tensors_of(x: Any) -> Iterator[Tensor]:
    """The tensors of a result, or of several, in order."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, Splits):  # keys go to other splits with blocks of another size
        yield from x.summed()
    elif isinstance(x, tuple | list):
        for part in x:
            yield from tensors_of(part)


def _wrong(wanted: Tensor, found: Tensor) -> str:
    if wanted.shape != found.shape or wanted.dtype != found.dtype:
        return "results of another shape"
    if not wanted.is_floating_point():
        share = (wanted != found).any(-1).double().mean().item() if wanted.numel() else 0.0
        return f"{share:.0%} of the lists differ" if share > _OTHER_ROWS else ""
    most, largest = 0.0, 0.0
    for a, b in zip(wanted.reshape(-1).split(_PIECE), found.reshape(-1).split(_PIECE), strict=True):
        finite = a.isfinite()
        same = torch.equal(finite, b.isfinite()) and torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num())
        if not same:
            return "NaN or infinity in other places"
        if finite.any():
            most = max(most, (a[finite] - b[finite]).abs().max().item())
            largest = max(largest, a[finite].abs().max().item())
    bound = 2 * _EPS[wanted.dtype] * largest
    return f"results differ by {most:.2e}, over {bound:.2e}" if most > bound else ""


_show: Callable[[str], object] | None = None  # of `reporting`


@contextmanager
def reporting(show: Callable[[str], object]) -> Iterator[None]:
    """Within it `show` gets the lines of `progress`."""
    global _show
    before, _show = _show, show
    try:
        yield
    finally:
        _show = before


def progress(text: str) -> None:
    """One line of a terminal, written over."""
    if _show is not None:
        _show(text)
    elif sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


def device_name() -> str:
    """For the reader of a file: the GPU, and the CUDA or ROCm version of torch."""
    if not torch.cuda.is_available():
        return "no GPU"
    return f"{torch.cuda.get_device_name()}, {torch.version.cuda or torch.version.hip}"


def config_text(config: Config) -> str:
    return f"{config.block_m} x {config.block_n}, {config.num_warps} warps, {config.num_stages} stages"


def failure(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
