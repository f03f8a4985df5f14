"""A workload: the shape, the pattern and how long to measure, read from workloads.toml."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

TASKS = ("forward", "train", "beside", "decode", "decode_row", "ready", "plan")
TABLE = Path(__file__).with_name("workloads.toml")


@dataclass(frozen=True)
class Workload:
    pattern: str
    window: int
    sinks: int
    batch: int
    heads: int
    head_dim: int
    dtype: str
    tokens: tuple[int, ...]
    plan_tokens: int
    beside_tokens: int
    decode_tokens: int
    repeats: int
    seconds: float
    timeout: float
    tasks: dict[str, list[str]]

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)


def read(suite: str, quick: bool) -> Workload:
    """The workload of a suite; `quick` overlays its `quick` table. Raises KeyError for an unknown suite."""
    table: dict[str, Any] = tomllib.loads(TABLE.read_text())[suite]
    table |= table.get("quick", {}) if quick else {}
    table["tokens"] = tuple(table["tokens"])
    return Workload(**{field.name: table[field.name] for field in fields(Workload)})
