"""The numbers of a diagnosis as tables that fit 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from spdsl.diagnosis.record import CRITICAL, STEPS, Diagnosis, Head, mean
from spdsl.tables import Column, Fitted

BACK = " / ".join(map(str, STEPS))
LEGEND = (
    ("kept", "dense mass on the keys read"),
    ("missed", f"share of the fewest keys with {CRITICAL:.0%} of the mass that the head does not read"),
    ("group", "that no head of its group reads"),
    ("error", "|out - dense| / |dense|"),
    ("sparse", "1 - keys read / keys"),
    ("union", "keys that the group reads / keys of the head"),
)


def tables(found: Diagnosis, by_layer: bool) -> Iterator[Fitted]:
    """A row for each head, or for each layer with means over its heads; then the choices."""
    yield _heads(found, by_layer)
    if found.choices:
        yield _choices(found, by_layer)


def title(found: Diagnosis) -> str:
    tokens = f"{found.queries:,} queries, {found.keys:,} keys"
    return f"{found.phase}, {tokens}, {len(found.layers)} layer{'s' * (len(found.layers) != 1)}"


def _heads(found: Diagnosis, by_layer: bool) -> Fitted:
    columns = [
        Column("branch", spare=9, words=True, apart=True),
        Column("layer", spare=0 if by_layer else 2, apart=not by_layer),
        Column("worst" if by_layer else "head", "head that misses most" if by_layer else "", spare=3 * by_layer),
        *(Column(name, means) for name, means in LEGEND),
        Column("stays", f"in percent, of the keys read, those that the queries {BACK} before read, too", spare=1),
    ]  # fmt: skip
    table = Fitted(title(found), columns)
    for branch, of_branch in _grouped(found):
        for number, group in groupby(of_branch, lambda one: one.layer):
            heads = list(group)
            layer = str(number) if by_layer else f"layer {number}"
            for row in [_layer_row(heads)] if by_layer else [_row(str(one.head), mean([one])) for one in heads]:
                table.add_row(branch, layer, *row)
        if len(of_branch) > 1:
            table.add_row(branch, "all", *_row("" if by_layer else "all", mean(of_branch)))
    return table


def _grouped(found: Diagnosis) -> Iterator[tuple[str, list[Head]]]:
    """The whole result first, without a name."""
    names = dict.fromkeys([None, *(one.branch for one in found.heads)])
    for name in names:
        yield "" if name is None else f"branch {name}", [one for one in found.heads if one.branch == name]


def _layer_row(heads: Sequence[Head]) -> list[str]:
    worst = max(heads, key=lambda one: one.missed)
    return _row(str(worst.head), mean(heads))


def _row(head: str, of: dict[str, Any]) -> list[str]:
    shares = [_share(of[name]) for name in ("kept", "missed", "missed_by_group")]
    return [head, *shares, _number(of["error"]), _share(of["sparsity"]), _number(of["union"]), _stays(of["overlap"])]


def _choices(found: Diagnosis, by_layer: bool) -> Fitted:
    columns = [
        Column("choice", words=True), Column("layer"), Column("list"), Column("units", "units of a list"),
        Column("stays", f"in percent, of its units, those that the lists {BACK} queries before had, too"),
    ]  # fmt: skip
    table = Fitted("choices", columns)
    for (layer, name), group in groupby(found.choices, lambda one: (one.layer, one.choice)):
        rows = list(group)
        if by_layer:
            overlap = [_mean([one.overlap[i] for one in rows]) for i in range(len(STEPS))]
            table.add_row(name, str(layer), "all", f"{sum(one.units for one in rows) / len(rows):.1f}", _stays(overlap))
            continue
        for one in rows:
            table.add_row(name, str(layer), str(one.head), f"{one.units:.1f}", _stays(one.overlap))
    return table


def _mean(values: Sequence[float | None]) -> float | None:
    known = [x for x in values if x is not None]
    return sum(known) / len(known) if known else None


def _stays(overlap: Sequence[float | None]) -> str:
    return "/".join("-" if x is None else f"{100 * x:.0f}" for x in overlap)


def _share(x: object) -> str:
    """In percent; what is not quite all does not look like it."""
    if not isinstance(x, float | int):
        return "-"
    return f"{min(100 * x, 99.9 if x < 1 else 100):.1f}%"


def _number(x: object) -> str:
    if not isinstance(x, float | int):
        return "-"
    return f"{x:.2f}" if x >= 0.01 or x == 0 else f"{x:.0e}"
