"""Where the mass lies that is not read, on the terminal: half blocks in colours, or shades where there are none."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from spdsl.diagnosis.record import Diagnosis

LEVELS = (0.001, 0.01, 0.03, 0.1)  # of the mass of a query, in one tile
COLOURS = ("#2b2f38", "#3d5a80", "#8d6a9f", "#e0804a", "#f9d65c")
_SHADES = ("  ", "··", "░░", "▒▒", "██")
_WIDEST = 64


def heat(console: Console, found: Diagnosis) -> None:
    """A tile map of queries (down) and keys (across), then the layers and heads where there are several."""
    shades = console.color_system is None
    tiles = _levels(found, _WIDEST if not shades else min(_WIDEST, console.width // 2))
    console.print(Text("dense mass of a query that it does not read, by tile (queries down, keys across)", "italic"))
    for line in _shaded(tiles) if shades else _half_blocks(tiles):
        console.print(line, no_wrap=True, crop=False)
    console.print(_legend(shades, found.step * -(-len(found.lost) // len(tiles))))
    if len(found.layers) > 1:
        _by_head(console, found)


def _levels(found: Diagnosis, side: int) -> list[list[int]]:
    """The level of each tile; at most `side` tiles, larger ones where there are more."""
    lost, factor = found.lost, -(-len(found.lost) // side)
    if factor > 1:
        size = -(-len(lost) // factor)
        whole = lost.new_zeros(size * factor, size * factor)
        whole[: len(lost), : len(lost)] = lost
        lost = whole.view(size, factor, size, factor).sum(3).mean(1)
    found_levels: list[list[int]] = sum((lost >= level).long() for level in LEVELS).tolist()  # type: ignore[union-attr]
    return found_levels


def _half_blocks(tiles: list[list[int]]) -> list[Text]:
    lines = []
    for upper, lower in zip(tiles[::2], [*tiles[1::2], *([None] * (len(tiles) % 2))], strict=True):
        line = Text()
        for i, level in enumerate(upper):
            line.append("▀", f"{COLOURS[level]}{f' on {COLOURS[lower[i]]}' if lower else ''}")
        lines.append(line)
    return lines


def _shaded(tiles: list[list[int]]) -> list[Text]:
    return [Text("".join(_SHADES[level] for level in row).rstrip()) for row in tiles]


def _legend(shades: bool, tile: int) -> Text:
    legend = Text()
    for level, least in enumerate(LEVELS, 1):
        mark = _SHADES[level] if shades else "██"
        legend.append(mark, "" if shades else COLOURS[level]).append(f" {100 * least:g}%  ")
    return legend.append(f"or more of its mass; tiles of {tile}", "dim")


def _by_head(console: Console, found: Diagnosis) -> None:
    """Tenths of the critical keys that are missed: a line for each layer, a digit for each head."""
    console.print(Text("critical keys missed, in tenths (layers down, heads across)", "italic"))
    for layer in found.layers:
        heads = [one for one in found.whole if one.layer == layer]
        line = Text(f"{layer:>4} ", "dim")
        for one in heads:
            tenths = min(9, int(10 * one.missed))
            line.append(f"{tenths}", COLOURS[0 if not tenths else 1 + (tenths - 1) // 3] if tenths else "dim")
        console.print(line)
