"""tiles: units of given and drawn sets that are smaller than the tiles that the kernels visit them with.

A tile map visits a tile whole if it may hold a pair. Forward, dQ and dK/dV have tiles of their own, so a unit that
fills one of them can waste most of another.
"""

from __future__ import annotations

from collections.abc import Iterator

from spdsl.checks.kernels import Launch, launches
from spdsl.checks.pages import spread
from spdsl.checks.view import View, warning
from spdsl.diagnostics import Applicability, Diagnostic, Hint
from spdsl.ir.pattern import Choice
from spdsl.passes.source_numbers import Written, argument

KERNELS = ("forward", "dq", "dkdv")
# Units of 64 x 64 fill half of the largest tiles of the tables, 128 x 64. Up to twice that is left to neighbours, which
# a list tends to name together.
MOST_WASTE = 4


def tiles(view: View) -> Iterator[Diagnostic]:
    told: set[Choice] = set()
    every = [one for one in launches(view) if one.kernel.name in KERNELS]
    for softmax in view.plan.softmaxes:
        if not softmax.maps:
            continue
        own = [one for one in every if one.of == softmax.name]
        for choice in softmax.reads:
            if isinstance(choice, Choice) and not choice.listed and choice not in told and own:
                told.add(choice)
                yield from _check(view, choice, own)


def _check(view: View, choice: Choice, own: list[Launch]) -> Iterator[Diagnostic]:
    rows = [spread(choice.rows, one.config.block_m) for one in own]
    units = [spread(choice.unit, one.config.block_n) for one in own]
    factors = [by_rows * by_units for by_rows, by_units in zip(rows, units, strict=True)]
    if max(factors) <= MOST_WASTE:
        return
    parts = [
        f"{one.kernel.name} {one.config.block_m} x {one.config.block_n}: {float(factor):,.4g} times"
        for one, factor in zip(own, factors, strict=True)
    ]
    places = {name: argument(view.tree, choice.span, name) for name in ("unit", "rows")}
    place = places["rows" if max(rows) > max(units) else "unit"] or places["unit"] or places["rows"]
    yield warning(
        "W504",
        f"a unit of {'all rows' if choice.for_all else choice.rows} x {choice.unit} that is listed alone costs "
        f"{float(max(factors)):,.4g} times its pairs",
        place.place if place else choice.span,
        "smaller than the tiles, or across their edges",
        f"tiles that are computed for it, in the mean over its places: {', '.join(parts)}",
        hints=tuple(_hints(choice, own, places)),
    )


def _hints(choice: Choice, own: list[Launch], places: dict[str, Written | None]) -> Iterator[Hint]:
    """Sizes that leave half of the largest tile at most."""
    block_n, block_m = max(one.config.block_n for one in own), max(one.config.block_m for one in own)
    for name, size, wanted in (("unit", choice.unit, block_n), ("rows", choice.rows, max(16, block_m // 2))):
        written = places[name]
        if size % wanted:
            text = f"`{name} = {wanted}` fills the tiles"
            yield written.hint(text, size, wanted, Applicability.MAYBE) if written else Hint(text)
