"""The tiles of a mask in half blocks, two rows of tiles in a line; in shades where the terminal has no colours."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from spdsl.ir.pattern import Pattern
from spdsl.oracle.sketch import Sketch, sketches
from spdsl.picture import heading, percent

STATES = ("empty", "partial", "full")
COLOURS = ("#3a3f4b", "#5aa9e6", "#f4b942")
_SHADES = (" ·", "▒▒", "██")
_WIDEST = 64  # tiles in a line
_SMALLEST = 32  # columns that a picture fills at least


def draw(pattern: Pattern, length: int, console: Console | None = None) -> None:
    """Prints a picture per softmax, stream and differing head."""
    console = console or Console(highlight=False)
    found, notes = sketches(pattern, length)
    title = Text(pattern.name, "bold")
    title.append(f"  {heading(pattern)}" if pattern.params else "", "not bold")
    title.append(f"  {length} queries and keys", "not bold dim")
    console.print(title)
    for sketch in found:
        _draw_one(console, pattern, sketch)
    for note in notes:
        console.print(Text(note, "italic"))


def _draw_one(console: Console, pattern: Pattern, sketch: Sketch) -> None:
    shades = console.color_system is None
    width = max(1, min(_WIDEST, console.width // 2 if shades else console.width))
    shown = sketch.coarser(-(-len(sketch.counts) // width))
    states: list[list[int]] = shown.states().tolist()
    name = ", ".join(filter(None, (sketch.name, "" if sketch.head is None else f"head {sketch.head}")))
    if name:
        console.print(Text(name, "cyan"))
    for line in _shaded(states) if shades else _half_blocks(states):
        console.print(line, no_wrap=True, crop=False)
    console.print(_legend(states, shown.tile, shades))
    pairs = "causal pairs" if pattern.causal else "pairs"
    if sketch.stride == 1:
        summary = f"sparsity {sketch.sparsity:.1%}: {sketch.seen:,} of {sketch.possible:,} {pairs} are visible"
    else:
        summary = (
            f"sparsity {sketch.sparsity:.1%}: {sketch.seen:,} pairs with an entry, for {sketch.possible:,} {pairs}"
        )
    console.print(Text(summary))


def _half_blocks(states: list[list[int]]) -> list[Text]:
    scale = max(1, _SMALLEST // len(states))
    large = [[state for state in row for _ in range(scale)] for row in states for _ in range(scale)]
    lines = []
    for upper, lower in zip(large[::2], [*large[1::2], *([None] * (len(large) % 2))], strict=True):
        line = Text()
        for i, state in enumerate(upper):
            below = f" on {COLOURS[lower[i]]}" if lower else ""
            line.append("▀", f"{COLOURS[state]}{below}")
        lines.append(line)
    return lines


def _shaded(states: list[list[int]]) -> list[Text]:
    return [Text("".join(_SHADES[state] for state in row).rstrip()) for row in states]


def _legend(states: list[list[int]], tile: int, shades: bool) -> Text:
    """How many tiles are empty, partial, full, and how large a tile is."""
    legend = Text()
    every = [state for row in states for state in row]
    for state, name in enumerate(STATES):
        legend.append(_SHADES[state].strip() if shades else "██", COLOURS[state])
        legend.append(f" {name} {percent(every.count(state) / len(every))}   ")
    return legend.append(f"tiles of {tile} x {tile}", "dim")
