"""Numbered pieces of work on CPU tensors in threads, each of which keeps torch on one core.

Where torch shares one operation among cores, its threads meet at the end of each: hundreds of times a call, and beside
another process every meeting waits until the slowest thread has had its turn on a core. These threads meet once.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any

import torch

PIECES_PER_THREAD = 2  # with fewer some threads would idle, and torch shares out each operation better
_PIECES_AHEAD = 8  # per thread: what may wait in memory for the pieces before it


def in_order(count: int, run: Callable[[int], Any], take: Callable[[Any], None]) -> None:
    """take(run(i)) for i of range(count): `run` at any time in any thread, `take` in this order, one at a time.

    So sums in `take` have one order, whatever the number of threads. An exception of either comes out here.
    """
    threads = torch.get_num_threads()
    if threads == 1 or count < PIECES_PER_THREAD * threads or not _can_keep_one_core():
        for number in range(count):
            take(run(number))
        return
    line = _Line(count, run, take, _PIECES_AHEAD * threads)
    workers = [threading.Thread(target=line.work, daemon=True) for _ in range(threads - 1)]
    for worker in workers:
        worker.start()
    line.work()
    try:
        for worker in workers:
            worker.join()
    finally:  # an interrupt stops the others, too: they write to tensors of the caller
        line.stop()
        for worker in workers:
            worker.join()
    if line.failure is not None:
        raise line.failure


class _Line:
    """Hands out numbers to threads, and hands on their results in the order of the numbers."""

    def __init__(self, count: int, run: Callable[[int], Any], take: Callable[[Any], None], ahead: int) -> None:
        self.count, self.run, self.take, self.ahead = count, run, take, ahead
        self.inference = torch.is_inference_mode_enabled()  # belongs to a thread
        self.change = threading.Condition()
        self.started = self.taken = 0
        self.taking = False
        self.found: dict[int, Any] = {}
        self.failure: BaseException | None = None

    def work(self) -> None:
        try:
            with on_cores(1), torch.inference_mode(self.inference), torch.no_grad():
                while (number := self._next()) is not None:
                    self._hand_on(number, self.run(number))
        except BaseException as failure:  # raised once all threads are done
            self.failure = self.failure or failure
            self.stop()

    def stop(self) -> None:
        with self.change:
            self.count = 0
            self.change.notify_all()

    def _next(self) -> int | None:
        with self.change:
            self.change.wait_for(lambda: self.started >= self.count or self.started < self.taken + self.ahead)
            if self.started >= self.count:
                return None
            self.started += 1
            return self.started - 1

    def _hand_on(self, number: int, result: Any) -> None:
        """Nobody waits here: who finds another thread at it leaves the result to that one."""
        with self.change:
            self.found[number] = result
            if self.taking:
                return
            self.taking = True
        while True:
            with self.change:
                if self.taken not in self.found:
                    self.taking = False
                    return
                result = self.found.pop(self.taken)
            self.take(result)
            with self.change:
                self.taken += 1
                self.change.notify_all()


@lru_cache
def _can_keep_one_core() -> bool:
    """Tried in a thread of its own, which ends with it."""
    found: list[bool] = []

    def attempt() -> None:
        with on_cores(1):
            found.append(torch.get_num_threads() == 1)

    trial = threading.Thread(target=attempt, daemon=True)
    trial.start()
    trial.join()
    return found == [True]


@contextmanager
def on_cores(count: int) -> Iterator[None]:
    """Torch works on as many cores in this thread. `torch.set_num_threads` would say so to threads of others, too."""
    before = torch.get_num_threads()  # the first call takes over the number of the process
    of_products = _set_cores(count, count)
    try:
        yield
    finally:
        _set_cores(before, of_products)


def _set_cores(count: int, of_products: int) -> int:
    """OpenMP's number of this thread, and that of MKL (0: that of the process), which once set follows no other."""
    library = _torch_library()
    if set_count := getattr(library, "omp_set_num_threads", None):
        set_count(count)
    set_products = getattr(library, "MKL_Set_Num_Threads_Local", None)
    return set_products(of_products) if set_products else 0


@lru_cache
def _torch_library() -> ctypes.CDLL | None:
    """The library whose functions, and those of its own libraries, torch itself calls."""
    folder = os.path.join(os.path.dirname(torch.__file__), "lib")
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        with suppress(OSError):
            return ctypes.CDLL(os.path.join(folder, name))
    return None
