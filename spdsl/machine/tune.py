"""Tuning a generated file ahead of time: measured on this machine's GPU, or ranked by the model for a GPU elsewhere."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from spdsl.machine.module_report import loaded
from spdsl.machine.record import library_of, refuse_interpreter
from spdsl.runtime.tuning.trials import tensors_of
from spdsl.tables import Column, Fitted
from spdsl.targets import Target

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_SHORT = 256  # tokens of the calls that show which kernels there are; their lengths are replaced

Found = dict[Any, Any]
"""A module's `Bucket` -> its `Winner`."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the calls; None leaves a size to the pattern, or to what `example_inputs` takes by default."""

    batch: int = 1
    heads: int | None = None
    kv_heads: int | None = None
    dim: int | None = None
    page: int | None = 64
    dtype: str = "bf16"

    def named(self) -> dict[str, int]:
        """For `example_inputs`."""
        known = {"heads": self.heads, "kv_heads": self.kv_heads, "qk_dim": self.dim, "v_dim": self.dim}
        return {name: size for name, size in known.items() if size is not None}


def tune_file(path: Path, lengths: Sequence[int], phases: Sequence[str], sizes: Sizes, store: Path) -> Found:
    """Measures on the GPU of this machine and keeps the winners in `store`. Raises RuntimeError without a GPU."""
    refuse_interpreter()
    if not torch.cuda.is_available():
        raise RuntimeError("this machine has no GPU: --offline ranks with the model alone")
    with loaded(path) as module, _bar(module, f"tuning {path.name}") as advance:
        found: Found = {}
        calls = list(_calls(module, lengths, _phases(module, phases), sizes, "cuda"))
        for number, (name, call) in enumerate(calls):
            advance(number, len(calls), name)
            found |= module.tune(call, store=store)
        return found


def rank_file(
    path: Path, lengths: Sequence[int], phases: Sequence[str], sizes: Sizes, store: Path, target: Target
) -> Found:
    """Ranks with the model of the module's candidates, for `target`. A measured winner in `store` stays."""
    refuse_interpreter()
    with loaded(path) as module:
        rt = library_of(module)
        found: Found = {}
        for length in lengths:
            for bucket, default in _asked(module, _phases(module, phases), sizes, target):
                own = bucket._replace(
                    queries=1 if bucket.queries == 1 else rt.length_bucket(length), keys=rt.length_bucket(length)
                )
                near = rt.bucket_candidates(own, default)
                best = min(near, key=partial(rt.rank, own.kernel, default=default))
                found[own] = rt.Winner(best, None, None, len(near), f"ranked for {target.name}")
        named = {rt.bucket_key(bucket): winner for bucket, winner in found.items()}
        rt.write_winners(module.MODULE.tuner.store_for(store), named)
        return found


def rows(found: Mapping[Any, Any]) -> list[dict[str, Any]]:
    """Each bucket with its winner as JSON types: times in milliseconds, None where only the model has ranked."""
    return [{**bucket._asdict(), **winner._asdict()} for bucket, winner in found.items()]


def table(found: Mapping[Any, Any]) -> Fitted:
    """One row for each bucket: the default's time, the winner's, and what won."""
    columns = (
        Column("kernel", words=True),
        Column("queries", "tokens of the call, rounded up"),
        Column("keys"),
        Column("page, unit", "tokens of a page of the cache or of a chosen unit", spare=3),
        Column("default ms", "time of the configuration of the tables", spare=4),
        Column("tuned ms", "time of the fastest one", spare=2),
        Column("gain", "how much faster that is", spare=1),
        Column("configuration", "rows x keys of a tile, warps, stages", words=True),
        Column("tried", "configurations", spare=5),
    )
    shown = Fitted("fastest configurations", columns)
    for bucket, winner in found.items():
        measured = winner.milliseconds is not None
        shown.add_row(
            f"{bucket.function.partition('_kernel')[0]} {bucket.kernel}",
            str(bucket.queries),
            str(bucket.keys),
            str(bucket.most_n or ""),
            f"{winner.default:.3f}" if measured else "",
            f"{winner.milliseconds:.3f}" if measured else "",
            f"{winner.default / winner.milliseconds - 1:+.0%}" if measured else "",
            "{} x {}, {} warps, {} stages".format(*winner.config),
            str(winner.tried),
        )
    return shown


def _phases(module: ModuleType, wanted: Sequence[str]) -> tuple[str, ...]:
    """Those of the module that are wanted, by default all. ValueError for one that it lacks."""
    missing = [phase for phase in wanted if phase not in module.PHASES]
    if missing:
        raise ValueError(f"the module has no phase {missing[0]}; it has {', '.join(module.PHASES)}")
    return tuple(wanted) or module.PHASES


def _calls(
    module: ModuleType, lengths: Sequence[int], phases: Sequence[str], sizes: Sizes, device: str
) -> Iterator[tuple[str, Callable[[], object]]]:
    runs = {"train": _train, "prefill": _prefill, "decode": _decode}
    for length in lengths:
        for phase in phases:
            yield f"{phase} {length}", partial(runs[phase], module, length, sizes, device)


def _train(module: ModuleType, length: int, sizes: Sizes, device: str) -> None:
    inputs = _inputs(module, length, sizes, device)
    leaves = [x for name, x in inputs.items() if x.dim() == 4 and x.is_floating_point() and name != "gates"]
    for x in leaves:
        x.requires_grad_()
    with torch.enable_grad():
        outputs = [x for x in tensors_of(module.attention(**inputs)) if x.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])


@torch.no_grad()
def _prefill(module: ModuleType, length: int, sizes: Sizes, device: str) -> None:
    module.prefill(**_inputs(module, length, sizes, device), cache=_cache(module, length, sizes, device))


@torch.no_grad()
def _decode(module: ModuleType, length: int, sizes: Sizes, device: str) -> None:
    """A step at the end of a cache that is full of random keys."""
    cache = _cache(module, length, sizes, device)
    for store in [*cache.k.values(), *cache.v.values()]:
        store.normal_()
    cache.lengths.fill_(length - 1)
    module.decode(**_inputs(module, 1, sizes, device), cache=cache)


def _inputs(module: ModuleType, tokens: int, sizes: Sizes, device: str) -> dict[str, Tensor]:
    dtype = DTYPES[sizes.dtype]
    made: dict[str, Tensor] = module.example_inputs(sizes.batch, tokens, **sizes.named(), dtype=dtype, device=device)
    return made


def _cache(module: ModuleType, capacity: int, sizes: Sizes, device: str) -> Any:
    """The defaults of `example_inputs` are those of the pattern, or ours: the cache asks for what is open."""
    defaults = inspect.signature(module.example_inputs).parameters
    named = {name: sizes.named().get(name, defaults[name].default) for name in ("kv_heads", "qk_dim", "v_dim")}
    return module.Cache(sizes.batch, capacity, **named, page=sizes.page, dtype=DTYPES[sizes.dtype], device=device)


def _asked(module: ModuleType, phases: Sequence[str], sizes: Sizes, target: Target) -> list[tuple[Any, Any]]:
    """The buckets of short calls and their defaults on that GPU. No kernel runs."""
    rt = library_of(module)
    rt.use_tables(target.architecture, target.sm_count)
    try:
        with module.MODULE.tuner.asking() as asked, rt.launching(lambda *args, **named: None):
            for _, call in _calls(module, [_SHORT], phases, sizes, "cpu"):
                call()
    finally:
        rt.use_tables(None)
    return list(asked.items())


@contextmanager
def _bar(module: ModuleType, title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on a terminal: calls done, and what the module tries for the present one."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)

        def advance(done: int, of: int, name: str) -> None:
            bar.update(task, completed=done, total=of, description=name)

        with library_of(module).reporting(lambda text: bar.update(task, description=text) if text else None):
            yield advance
            bar.update(task, completed=bar.tasks[0].total or 0)
