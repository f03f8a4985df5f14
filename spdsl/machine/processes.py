"""Work that may end its process: in forked ones, one for each core, so that it costs one result and not the others."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

Result = TypeVar("Result")
_work: Callable[[int], Any]  # of a worker process, which inherits it: a kernel cannot be sent to one


def most_workers() -> int:
    """Processes that compile at once: one for each core this process may use, at most 16, since one takes 0.5 GB."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, 16))


def each(
    work: Callable[[int], Result], lost: Callable[[int], Result], count: int, workers: int | None = None
) -> Iterator[tuple[int, Result]]:
    """`work(i)` for i below `count`, as they are done; `lost(i)` for one that ended its process.

    Where there is no fork, or with one worker, the work is done here.
    """
    workers = workers or most_workers()
    if workers > 1 and "fork" in multiprocessing.get_all_start_methods():
        yield from _in_processes(work, lost, count, workers)
    else:
        yield from ((i, work(i)) for i in range(count))


def _in_processes(
    work: Callable[[int], Result], lost: Callable[[int], Result], count: int, workers: int
) -> Iterator[tuple[int, Result]]:
    again: list[int] = []
    with _pool(work, workers) as pool:
        futures = {pool.submit(_run, index): index for index in range(count)}
        for future in as_completed(futures):
            try:
                yield futures[future], future.result()
            except BrokenProcessPool:
                again.append(futures[future])
    # One job ended its process and took the others along: each of them alone tells which it was.
    for index in sorted(again):
        with _pool(work, 1) as pool:
            try:
                yield index, pool.submit(_run, index).result()
            except BrokenProcessPool:
                yield index, lost(index)


def _pool(work: Callable[[int], Any], workers: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("fork")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(work,))


def _start(work: Callable[[int], Any]) -> None:
    global _work
    _work = work


def _run(index: int) -> Any:
    return _work(index)
