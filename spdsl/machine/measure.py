"""measure: times on this machine's GPU beside those of the cost model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from types import ModuleType
from typing import Any

import torch

from spdsl.cost.estimate import Curve
from spdsl.cost.phases import Stage
from spdsl.cost.report import duration
from spdsl.passes.count import Shape

Timer = Callable[[Callable[[], object]], float]
_RUNS = 10  # the median of them counts


class NoGpu(Exception):
    """Nothing can be measured here."""


@dataclass(frozen=True, slots=True)
class Measured:
    stage: Stage
    length: int
    predicted: float  # seconds
    measured: float

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was measured."""
        return abs(self.predicted - self.measured) / self.measured


def gpu_timer(call: Callable[[], object]) -> float:
    """Seconds of a call, the median of some runs after two that do not count."""
    times = []
    for run in range(_RUNS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        end.synchronize()
        if run >= 2:
            times.append(start.elapsed_time(end) / 1000)
    return float(median(times))


def measured(load: Callable[[], ModuleType], curves: Sequence[Curve], form: str) -> str:
    """A table or JSON of every point that fits into memory. Raises NoGpu before anything is loaded."""
    if not torch.cuda.is_available():
        raise NoGpu("--measure needs a GPU that torch can use, and this machine has none")
    return told(compared(load(), curves, gpu_timer, "cuda"), form)


def compared(module: ModuleType, curves: Sequence[Curve], timer: Timer, device: str) -> list[Measured]:
    """Each point of the curves, timed; lengths that do not fit into memory are left out."""
    found = []
    for curve in curves:
        for point in curve.points:
            try:
                call = _call(module, curve.stage, point.length, curve.shape, device)
                seconds = timer(call)
                if curve.stage is Stage.BACKWARD:
                    seconds -= timer(_call(module, Stage.FORWARD, point.length, curve.shape, device))
            except torch.OutOfMemoryError:
                break
            found.append(Measured(curve.stage, point.length, point.seconds, max(seconds, 1e-9)))
    return found


def told(found: Sequence[Measured], form: str = "text") -> str:
    error = median(one.error for one in found) if found else None
    if form == "json":
        rows = [
            {
                "phase": x.stage.value,
                "length": x.length,
                "predicted": x.predicted,
                "measured": x.measured,
                "error": x.error,
            }
            for x in found
        ]
        return json.dumps({"points": rows, "median_error": error}, indent=1)
    lines = [
        f"{x.stage.value:>8} {x.length:>9,}  predicted {duration(x.predicted):>8}  measured {duration(x.measured):>8}  "
        f"off by {x.error:.0%}"
        for x in found
    ]
    return "\n".join([*lines, f"median error {error:.0%}" if error is not None else "nothing fits into memory"])


def _call(module: ModuleType, stage: Stage, length: int, shape: Shape, device: str) -> Callable[[], object]:
    """The call whose time is asked for; the backward includes its forward."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    inputs = _inputs(module, 1 if stage is Stage.DECODE else length, shape, dtype, device)
    if stage is Stage.FORWARD:
        return lambda: module.attention(**inputs)
    if stage is Stage.BACKWARD:
        for x in inputs.values():
            if x.is_floating_point() and x.dim() == 4:
                x.requires_grad_()
        return lambda: _first(module.attention(**inputs)).sum().backward()  # type: ignore[no-untyped-call]
    dims = {"kv_heads": shape.kv_heads, "qk_dim": shape.qk, "v_dim": shape.v}
    cache = module.Cache(shape.batch, length + 4 * _RUNS, **dims, dtype=dtype, device=device)
    if stage is Stage.DECODE:
        if length > 1:
            module.prefill(**_inputs(module, length - 1, shape, dtype, device), cache=cache)
        return lambda: module.decode(**inputs, cache=cache)

    def prefill() -> object:
        cache.reset()
        return module.prefill(**inputs, cache=cache)

    return prefill


def _first(result: Any) -> torch.Tensor:
    first: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return first


def _inputs(module: ModuleType, tokens: int, shape: Shape, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = module.example_inputs(
        shape.batch, tokens, heads=shape.heads, kv_heads=shape.kv_heads, qk_dim=shape.qk, v_dim=shape.v, dtype=dtype,
        device=device,
    )  # fmt: skip
    return dict(found)
