"""Which configuration a kernel takes: the fastest one that was found for calls like this one, else that of the tables.

At the first call of its kind on a GPU, a host function is run again with other configurations, on the tensors of that
call. Calls of one kind share a bucket: kernel, types, head dims, and lengths up to the same power of two.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spdsl.runtime.sequences import Layout, expect
from spdsl.runtime.tuning.buckets import Bucket, bucket_key
from spdsl.runtime.tuning.configs import Config
from spdsl.runtime.tuning.search import Search, find_all, present_search
from spdsl.runtime.tuning.tuned_store import Store, Winner, default_store, store_at, stored_winners, write_winners

TUNING_MODES = ("on", "stored", "off")


class Tuner:
    """The configurations of one module: what was found for its kernels, and where that is kept.

    file: the path of the module's text; without one, or if it is gone, what is found stays in memory.
    library: the digest of the library, of which the kernels are made as well.
    """

    def __init__(self, file: str | None, library: str) -> None:
        self.file = Path(file).absolute() if file else None
        self.library = library
        self.mode: str | None = None
        self.group: Any = None  # torch.distributed.ProcessGroup of the `tune` under way, or None
        self.sought: dict[Bucket, Winner] | None = None  # what the `tune` under way has found: everything anew
        self.store: Store | None = None  # where it keeps that
        self.asked: dict[Bucket, Config] | None = None  # within `asking`
        self._winners: dict[str, Winner] | None = None

    def tuning(self, mode: str | None) -> None:
        """`on`: kernels are tuned at their first call; `stored`: what was found before is used; `off`: tables alone.

        None is as at first: what the environment variable SPDSL_TUNE says, `on` without it.
        """
        expect(mode is None or mode in TUNING_MODES, "mode", "on, stored, off or None", mode)
        self.mode = mode

    def tune(
        self, call: Callable[[], object], *, group: Any = None, store: str | os.PathLike[str] | None = None
    ) -> dict[Bucket, Winner]:
        """Finds the configurations of all kernels that `call()` launches, anew, and keeps them. -> winners by bucket.

        group: a torch.distributed process group. Its ranks make the same calls, and the slowest counts, so all choose
        the same. store: the file to keep them in; by default `<module>.tuned.json` where it can be written, else the
        cache. Raises RuntimeError if no kernel was launched, or a kernel runs in no configuration.
        """
        path = None if store is None else Path(store)
        before = self.sought, self.group, self.store
        found: dict[Bucket, Winner] = {}
        self.sought, self.group, self.store = found, group, self.store_for(path)
        try:
            call()
        finally:
            self.sought, self.group, self.store = before
        if not found:
            raise RuntimeError("nothing to tune: the call launched no kernel on a GPU")
        return found

    def tuned(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A host function with the best configurations that are known, found at its first call in a bucket.

        It takes a Layout and gives fresh tensors, so it can be run again. Nothing is found during a graph capture, nor
        by one rank of many on its own, since they must not choose differently: they use what is stored.
        """

        @wraps(function)
        def call(*args: Any, **named: Any) -> Any:
            idle = self.current_mode() == "off" and self.sought is None
            if self.asked is None and (idle or not on_gpu(args)):
                return function(*args, **named)
            run = partial(function, *args, **named)
            layout = next(x for x in args if isinstance(x, Layout))
            with present_search(Search(self, function.__name__, layout)) as search:
                if self.asked is None and self.may_search():
                    return find_all(run, search)
                result = run()
                if self.asked is not None:
                    self.asked |= search.asked
                return result

        return call

    @contextmanager
    def asking(self) -> Iterator[dict[Bucket, Config]]:
        """Within it nothing is searched for nor known: -> the buckets that calls ask for, with their defaults."""
        before, self.asked = self.asked, {}
        try:
            yield self.asked
        finally:
            self.asked = before

    def winner_of(self, bucket: Bucket) -> Winner | None:
        """What is known of a bucket; while everything is sought anew, what that found."""
        if self.asked is not None:
            return None
        return self.known().get(bucket_key(bucket)) if self.sought is None else self.sought.get(bucket)

    def known(self) -> dict[str, Winner]:
        """What was found in this process, and what the stores hold."""
        if self._winners is None:
            path = self._there()
            self._winners = {} if path is None else stored_winners(path, self.library)
        return self._winners

    def keep(self, bucket: Bucket, winner: Winner) -> None:
        """From now on the bucket has this winner."""
        key = bucket_key(bucket)
        self.known()[key] = winner
        if self.sought is not None:
            self.sought[bucket] = winner
        store = self.store_for(None) if self.sought is None else self.store
        if store is not None and winner.milliseconds is not None:  # else nothing could be timed: for this process only
            write_winners(store, {key: winner})

    def store_for(self, path: Path | None) -> Store | None:
        """The store at `path`, by default where winners are kept; None where the module has no file."""
        own = self._there()
        if own is None:
            return None
        return default_store(own, self.library) if path is None else store_at(path, own, self.library)

    def _there(self) -> Path | None:
        return self.file if self.file is not None and self.file.is_file() else None

    def current_mode(self) -> str:
        mode = self.mode or os.environ.get("SPDSL_TUNE") or "on"
        expect(mode in TUNING_MODES, "SPDSL_TUNE", "on, stored or off", mode)
        return mode

    def may_search(self) -> bool:
        if capturing():
            return False
        alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
        return self.sought is not None or (self.current_mode() == "on" and alone)


def on_gpu(args: tuple[Any, ...]) -> bool:
    return next(x for x in args if isinstance(x, Tensor)).is_cuda


def capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
