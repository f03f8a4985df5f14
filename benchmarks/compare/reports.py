"""Two reports of compiled kernels: where the newer one spills, uses more or multiplies in another way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]


class Line(NamedTuple):
    text: str
    worse: bool


def compare(old: str, new: str) -> list[Line]:
    """A line for each number that differs, and for each kernel that one side lacks. More registers are not worse."""
    before, after = (by_kernel(json.loads(text)) for text in (old, new))
    lines = [Line(f"{' '.join(key)}: only in the {'old' if key in before else 'new'} report", key in before)
             for key in sorted(before.keys() ^ after.keys())]  # fmt: skip
    for key in sorted(before.keys() & after.keys()):
        for name, (was, now) in differing(numbers(before[key]), numbers(after[key])).items():
            lines.append(Line(f"{' '.join(key)}: {name} {was} -> {now}", is_worse(name, was, now)))
    return lines


def by_kernel(rows: list[Row]) -> dict[tuple[str, ...], Row]:
    """A kernel that is launched several times for a workload keeps its place among these."""
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        head = (Path(str(row.get("file", ""))).name, row["kernel"], str(row["workload"]), row["target"])
        place = sum(key[:-1] == head for key in found)
        found[(*head, str(place))] = row
    return found


def numbers(row: Row) -> Row:
    code = row.get("code") or {}
    whole = {name: row.get(name) for name in ("error", "shared", "num_warps", "num_stages", "computed")}
    return whole | {name: code.get(name) for name in ("registers", "spills")} | {"products": str(code.get("loop_mma"))}


def differing(old: Row, new: Row) -> dict[str, tuple[Any, Any]]:
    return {name: (old[name], new[name]) for name in old if old[name] != new[name]}


def is_worse(name: str, old: Any, new: Any) -> bool:
    """Spills and repeats may not rise, products may not leave the tensor cores, what compiled still compiles."""
    if name == "error":
        return new is not None
    if name in ("spills", "computed"):
        return (new or 0) > (old or 0)
    return name == "products" and new in ("()", "[]")
