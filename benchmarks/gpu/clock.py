"""Times on the device: medians of many runs, each after a write that empties the L2 cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

COPY_BYTES = 2 << 30


def milliseconds(call: Callable[[], Any], once: bool = False) -> float:
    """The median time of a call; `once`: run it and return 0, to have its kernels compiled."""
    if once:
        call()
        synchronize()
        return 0.0
    if not torch.cuda.is_available():
        return statistics.median(_wall(call) for _ in range(3))
    from triton.testing import do_bench

    found: float = do_bench(call, warmup=50, rep=200, return_mode="median")
    return found


def _wall(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def captured(step: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
    """`step` as the replay of a CUDA graph, and what it returns; on the CPU the step itself."""
    if not torch.cuda.is_available():
        return step, step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph.replay, result


def bandwidth(size: int = COPY_BYTES) -> float:
    """Bytes per second, read plus written, of a large copy on the device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.randint(0, 127, (size if device == "cuda" else 1 << 20,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source)) * 1e3


def matrix_rate(size: int = 8192) -> float:
    """FLOP per second of a bf16 product of square matrices."""
    size = size if torch.cuda.is_available() else 128
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / milliseconds(lambda: a @ b) * 1e3
