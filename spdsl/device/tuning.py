"""Which configuration a kernel takes: the fastest one that was found for calls like this one, else that of the tables.

At the first call of its kind on a GPU, a host function is run again with other configurations, on the tensors of that
call. Calls of one kind share a bucket: kernel, types, head dims, and lengths up to the same power of two.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import triton
from torch import Tensor

from spdsl.device.buckets import Bucket, bucket_allows, bucket_candidates, bucket_key, length_bucket, rows_fixed
from spdsl.device.configs import Config, power_of_2
from spdsl.device.gpu import Gpu
from spdsl.device.sequences import Layout, expect
from spdsl.device.trials import config_text, device_name, difference, failure, milliseconds, progress
from spdsl.device.tuned_store import Store, Winner, default_store, say_once, store_at, stored_winners, write_winners

TUNING_MODES = ("on", "stored", "off")
_FASTER = 0.98  # what a candidate must reach of the best time so far: less is noise between two runs
_SEARCH_SECONDS = 60.0  # for one kernel, compilations included


class Sought(NamedTuple):
    """What `tune` is looking for: everything anew."""

    group: Any  # torch.distributed.ProcessGroup, or None
    store: Store | None
    found: dict[Bucket, Winner]


class Search:
    """What one call of a host function asks for."""

    def __init__(self, function: str, layout: Layout) -> None:
        self.function, self.queries, self.keys = function, length_bucket(layout.longest), length_bucket(layout.keys)
        self.asked: dict[Bucket, Config] = {}  # buckets without a winner, and their defaults
        self.trial: dict[Bucket, Config] = {}  # what is tried in place of them
        self.last: tuple[Bucket, Config] | None = None
        self.searching = False  # after the first result, which is the caller's


_mode: str | None = None
_sought: Sought | None = None
_winners: dict[str, Winner] | None = None
_present = threading.local()  # its `search`: that of the call under way; a backward pass has a thread of its own
_searching = threading.Lock()


def tuning(mode: str | None) -> None:
    """`on`: kernels are tuned at their first call; `stored`: what was found before is used; `off`: the tables alone.

    None is as at first: what the environment variable SPDSL_TUNE says, `on` without it.
    """
    global _mode
    expect(mode is None or mode in TUNING_MODES, "mode", "on, stored, off or None", mode)
    _mode = mode


def tune(
    call: Callable[[], object], *, group: Any = None, store: str | os.PathLike[str] | None = None
) -> dict[Bucket, Winner]:
    """Finds the configurations of all kernels that `call()` launches, anew, and keeps them. -> winners by bucket.

    group: a torch.distributed process group. Its ranks make the same calls, and the slowest counts, so all choose the
    same. store: the file to keep them in; by default `<module>.tuned.json` where it can be written, else the cache.
    Raises RuntimeError if no kernel was launched, or a kernel runs in no configuration.
    """
    global _sought
    path = None if store is None else Path(store)
    before, _sought = _sought, Sought(group, _store(path), {})
    try:
        call()
        found = _sought.found
    finally:
        _sought = before
    if not found:
        raise RuntimeError("nothing to tune: the call launched no kernel on a GPU")
    return found


def tuned(function: Callable[..., Any]) -> Callable[..., Any]:
    """A host function with the best configurations that are known, found at its first call in a bucket.

    It takes a Layout and gives fresh tensors, so it can be run again. Nothing is found during a graph capture, nor by
    one rank of many on its own, since they must not choose differently: they use what is stored.
    """

    @wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        if not on_gpu(args) or (tuning_mode() == "off" and _sought is None):
            return function(*args, **named)
        run = partial(function, *args, **named)
        with _present_search(Search(function.__name__, next(x for x in args if isinstance(x, Layout)))) as search:
            return find_all(run, search) if may_search() else run()

    return call


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
    winner = known_winners().get(bucket_key(bucket)) if _sought is None else _sought.found.get(bucket)
    if winner is not None and bucket_allows(bucket, winner.config):
        return winner.config
    search.asked[bucket] = default
    return default


def searching() -> bool:
    """Whether the call under way is one of a search: it does all of its work, whatever is needed of its results."""
    search: Search | None = getattr(_present, "search", None)
    return search is not None and search.searching


def on_gpu(args: tuple[Any, ...]) -> bool:
    return next(x for x in args if isinstance(x, Tensor)).is_cuda


def tuning_mode() -> str:
    mode = _mode or os.environ.get("SPDSL_TUNE") or "on"
    expect(mode in TUNING_MODES, "SPDSL_TUNE", "on, stored or off", mode)
    return mode


def may_search() -> bool:
    if capturing():
        return False
    alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
    return _sought is not None or (tuning_mode() == "on" and alone)


def capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@contextmanager
def _present_search(search: Search) -> Iterator[Search]:
    before = getattr(_present, "search", None)
    _present.search = search
    try:
        yield search
    finally:
        _present.search = before


def find_all(run: Callable[[], Any], search: Search) -> Any:
    """The results of the call, from the first configurations that run; afterwards its buckets have winners."""
    result = _first_result(run, search)
    if search.asked and _searching.acquire(blocking=False):  # another thread's search would disturb the times
        try:
            if _sought is None:
                say_once("tuning kernels at the first call for a length; SPDSL_TUNE=off: never, `spdsl tune`: before")
            search.searching = True
            wanted = run()
            for bucket, default in list(search.asked.items()):
                _keep(bucket, _found(run, search, bucket, default, wanted))
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
        ms, seconds = agreed(ms, time.monotonic() - began)
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


def agreed(ms: float, seconds: float) -> tuple[float, float]:
    """The largest of all ranks of `tune`'s group: what follows from them is the same everywhere."""
    group = None if _sought is None else _sought.group
    if group is None:
        return ms, seconds
    device = "cuda" if "nccl" in dist.get_backend(group) else "cpu"
    numbers = torch.tensor([ms, seconds], dtype=torch.float64, device=device)
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=group)
    return numbers[0].item(), numbers[1].item()


def known_winners() -> dict[str, Winner]:
    global _winners
    if _winners is None:
        _winners = {}
        path = globals().get("__file__")
        if path and Path(path).is_file():
            _winners = stored_winners(Path(path).absolute())
    return _winners


def _keep(bucket: Bucket, winner: Winner) -> None:
    key = bucket_key(bucket)
    known_winners()[key] = winner
    if _sought is not None:
        _sought.found[bucket] = winner
    store = _store(None) if _sought is None else _sought.store
    if store is not None and winner.milliseconds is not None:  # else nothing could be timed: for this process only
        write_winners(store, {key: winner})


def _store(path: Path | None) -> Store | None:
    own = globals().get("__file__")
    if not own or not Path(own).is_file():
        return None
    return default_store(Path(own).absolute()) if path is None else store_at(path, Path(own).absolute())
