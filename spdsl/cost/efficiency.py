"""efficiency: the measured shares of `efficiency.toml`, and which of them a GPU has of its own."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

KINDS = (
    "forward", "backward", "units", "units_backward", "select", "decode", "copy",
    "dense_forward", "dense_backward", "dense_decode",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Efficiency:
    kind: str
    of: str  # rate or bandwidth
    value: float
    source: str
    gpu: str  # whose it is
    derived: bool  # not measured in this form


def efficiency(gpu: str, kind: str) -> Efficiency:
    """That of the GPU, or of the nearest one that has it."""
    name, seen = gpu, set[str]()
    while name is not None and name not in seen:
        if (name, kind) in _measured():
            return _measured()[name, kind]
        seen.add(name)
        name = _data()["like"].get(name)
    raise ValueError(f"no efficiency of {kind} for {gpu}")


def launch_seconds() -> float:
    """Of one kernel, or of one operator of torch."""
    return float(_data()["launch"])


def borrowed(gpu: str) -> dict[str, list[str]]:
    """Which kinds the GPU has no source for, by the GPU that they are taken from."""
    kinds: dict[str, list[str]] = {}
    for kind in KINDS:
        if (owner := efficiency(gpu, kind).gpu) != gpu:
            kinds.setdefault(owner, []).append(kind)
    return kinds


@cache
def _data() -> dict[str, Any]:
    return tomllib.loads((Path(__file__).parent / "efficiency.toml").read_text(encoding="utf-8"))


@cache
def _measured() -> dict[tuple[str, str], Efficiency]:
    return {
        (entry["gpu"], entry["kind"]): Efficiency(
            entry["kind"], entry["of"], entry["value"], entry["source"], entry["gpu"], entry.get("derived", False)
        )
        for entry in _data()["measured"]
    }
