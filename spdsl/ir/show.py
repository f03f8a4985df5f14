"""The printed forms of the stages: one line per node, nested by indentation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum

from spdsl.diagnostics import Span
from spdsl.ir.plan import Plan
from spdsl.ir.visit import Range, Ranges, TileMap


def form(node: object) -> str:
    """A tree or a pattern as indented text."""
    return "\n".join(_lines(node, 0)) + "\n"


def _lines(node: object, depth: int) -> Iterator[str]:
    pad = "  " * depth
    if not is_dataclass(node):
        yield f"{pad}{node}"
        return
    plain, nested = [], []
    for field in fields(node):
        value = getattr(node, field.name)
        if isinstance(value, Span) or field.name == "depth" or value is None:
            continue
        if is_dataclass(value) or (isinstance(value, tuple) and any(is_dataclass(item) for item in value)):
            nested.append((field.name, value))
        else:
            plain.append(f"{field.name}={_plain(value)}")
    yield f"{pad}{type(node).__name__}({', '.join(plain)})"
    for name, value in nested:
        yield f"{pad}  {name}:"
        for item in value if isinstance(value, tuple) else (value,):
            yield from _lines(item, depth + 2)


def _plain(value: object) -> str:
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, frozenset):
        return "{" + ", ".join(sorted(_plain(item) for item in value)) + "}"
    return str(value)


def plan(plan: Plan, ranges: bool) -> str:
    """A plan as text; with `ranges`, what each sweep visits."""
    lines = []
    for softmax in [one for found in plan.softmaxes for one in (found, found.of_class) if one]:
        lines.append(f"softmax {softmax.name} (query {softmax.softmax.query})")
        for sweep in softmax.sweeps:
            lines.append(f"  sweep {sweep.stream.name}: {sweep.visit}, line {sweep.line}")
            lines.append(f"    test {sweep.test}")
            if ranges and isinstance(sweep.visit, Ranges):
                lines += [f"    keys {_range(found)}" for found in sweep.visit.keys]
                lines += [f"    rows {_range(found)}" for found in sweep.visit.rows]
            elif ranges and isinstance(sweep.visit, TileMap):
                lines += [f"    may  {sweep.visit.may}", f"    must {sweep.visit.must}"]
            if ranges:
                lines += [f"    decode {_range(found)}" for found in sweep.decode]
    lines += [f"joint {found.name}: {', '.join(found.parts)}" for found in plan.joints]
    return "\n".join(lines) + "\n"


def _range(found: Range) -> str:
    text = f"[{found.first}, {found.end}) full [{found.full_first}, {found.full_end})"
    if str(found.full) != "True":
        text += f" if {found.full}"
    return text if str(found.condition) == "True" else f"{text} visited if {found.condition}"
