"""The search for the fastest configurations of a host function: each candidate is run, timed and compared."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from spdsl.runtime.language import triton
from spdsl.runtime.sequences import Layout
from spdsl.runtime.tuning.buckets import Bucket, bucket_allows, bucket_candidates, length_bucket, rows_fixed
from spdsl.runtime.tuning.configs import Config, power_of_2
from spdsl.runtime.tuning.gpu import Gpu
from spdsl.runtime.tuning.trials import config_text, device_name, difference, failure, milliseconds, progress
from spdsl.runtime.tuning.tuned_store import Winner, say_once

_FASTER = 0.98  # what a candidate must reach of the best time so far: less is noise between two runs
_SEARCH_SECONDS = 60.0  # for one kernel, compilations included

_present = threading.local()  # its `search`: that of the call under way; a backward pass has a thread of its own
_searching = threading.Lock()


class Winners(Protocol):
    """What a search asks of a module's tuner, and tells it."""

    sought: dict[Bucket, Winner] | None
    group: Any

    def winner_of(self, bucket: Bucket) -> Winner | None: ...

    def keep(self, bucket: Bucket, winner: Winner) -> None: ...


class Search:
    """What one call of a host function asks for."""

    def __init__(self, tuner: Winners, function: str, layout: Layout) -> None:
        self.tuner = tuner
        self.function, self.queries, self.keys = function, length_bucket(layout.longest), length_bucket(layout.keys)
        self.asked: dict[Bucket, Config] = {}  # buckets without a winner, and their defaults
        self.trial: dict[Bucket, Config] = {}  # what is tried in place of them
        self.last: tuple[Bucket, Config] | None = None
        self.searching = False  # after the first result, which is the caller's


@contextmanager
def present_search(search: Search) -> Iterator[Search]:
    before = getattr(_present, "search", None)
    _present.search = search
    try:
        yield search
    finally:
        _present.search = before


def searching() -> bool:
    """Whether the call under way is one of a search: it does all of its work, whatever is needed of its results."""
    search: Search | None = getattr(_present, "search", None)
    return search is not None and search.searching


def tuned_config(
    kernel: str, q: Tensor, v_dim: int, gpu: Gpu, group: int, most_n: int, paged: bool, listed: bool, default: Config
) -> Config:
    """The configuration for the call under way: on trial, the winner of its bucket, or the default."""
    search: Search | None = getattr(_present, "search", None)
    if search is None:
        return default
    bucket = Bucket(
        search.function, kernel, *gpu, triton.__version__, str(q.dtype).removeprefix("torch."), q.element_size(),
        q.shape[-1], v_dim, group, search.queries, search.keys, most_n, paged, listed,
    )  # fmt: skip
    if rows_fixed(bucket):
        default = default._replace(block_m=max(16, power_of_2(group)))
    search.last = (bucket, default)
    if bucket in search.trial:
        return search.trial[bucket]
    winner = search.tuner.winner_of(bucket)
    if winner is not None and bucket_allows(bucket, winner.config):
        return winner.config
    search.asked[bucket] = default
    return default


def find_all(run: Callable[[], Any], search: Search) -> Any:
    """The results of the call, from the first configurations that run; afterwards its buckets have winners."""
    result = _first_result(run, search)
    if search.asked and _searching.acquire(blocking=False):  # another thread's search would disturb the times
        try:
            if search.tuner.sought is None:
                say_once("tuning kernels at the first call for a length; SPDSL_TUNE=off: never, `spdsl tune`: before")
            search.searching = True
            wanted = run()
            for bucket, default in list(search.asked.items()):
                search.tuner.keep(bucket, _found(run, search, bucket, default, wanted))
        finally:
            search.searching = False
            _searching.release()
    return result


def _first_result(run: Callable[[], Any], search: Search) -> Any:
    """The default configurations are the first to be tried. RuntimeError if one kernel runs in none."""
    failed: dict[Bucket, dict[Config, str]] = {}
    while True:
        try:
            return run()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if search.last is None:
                raise
            bucket, default = search.last
            reasons = failed.setdefault(bucket, {})
            reasons[search.trial.get(bucket, default)] = failure(error)
            search.asked.setdefault(bucket, default)
            left = [x for x in bucket_candidates(bucket, default) if x not in reasons]
            if not left:
                told = "; ".join(f"{config_text(config)}: {reason}" for config, reason in reasons.items())
                raise RuntimeError(f"{bucket.function}: no configuration of {bucket.kernel} runs: {told}") from error
            search.trial[bucket] = left[0]


def _found(run: Callable[[], Any], search: Search, bucket: Bucket, default: Config, wanted: Any) -> Winner:
    """The fastest candidate whose results are those of the first. Leaves it on trial for the buckets that follow."""
    began = time.monotonic()
    first = search.trial.get(bucket, default)
    best, best_ms, first_ms, tried = first, math.inf, math.inf, 0
    configs = [first, *(x for x in bucket_candidates(bucket, default) if x != first)]
    for config in configs:
        progress(f"{bucket.function} {bucket.kernel}: {tried}/{len(configs)}, {config_text(best)} {best_ms:.3f} ms")
        search.trial[bucket] = config
        ms, reason = _attempt(run, wanted, best_ms * _FASTER)
        if reason:
            say_once(f"{bucket.function}: {bucket.kernel} with {config_text(config)} is skipped: {reason}")
        ms, seconds = agreed(search.tuner.group, ms, time.monotonic() - began)
        first_ms = ms if config == first else first_ms
        tried += 1
        if ms < best_ms * _FASTER:
            best, best_ms = config, ms
        if seconds > _SEARCH_SECONDS:
            break
    progress("")
    search.trial[bucket] = best
    best_time, first_time = (x if math.isfinite(x) else None for x in (best_ms, first_ms))
    return Winner(best, best_time, first_time, tried, device_name())


def _attempt(run: Callable[[], Any], wanted: Any, limit: float) -> tuple[float, str]:
    """-> its time, infinite if it fails or would win with other results; and why it is skipped."""
    try:
        ms = milliseconds(run, limit)
        reason = difference(wanted, run()) if ms < limit else ""
    except Exception as error:
        return math.inf, failure(error)
    return (math.inf if reason else ms), reason


def agreed(group: Any, ms: float, seconds: float) -> tuple[float, float]:
    """The largest of all ranks of `tune`'s group: what follows from them is the same everywhere."""
    if group is None:
        return ms, seconds
    device = "cuda" if "nccl" in dist.get_backend(group) else "cpu"
    numbers = torch.tensor([ms, seconds], dtype=torch.float64, device=device)
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=group)
    return numbers[0].item(), numbers[1].item()
