"""The mask and its tiles as a PNG, by matplotlib without a display."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from spdsl.ir.pattern import Pattern
from spdsl.oracle.sketch import Sketch, sketches
from spdsl.picture import heading, percent

HIDDEN, VISIBLE, EXAMPLE = "#eef1f5", "#1f3a5f", "#e09f3e"
TILES = {"empty": "#eef1f5", "partial": "#8ecae6", "full": "#1f6fb2"}
INK, QUIET = "#1b2430", "#66707d"
_COLUMN, _LEFT, _RIGHT = 5.2, 0.88, 0.36  # inches: a column, left of its panels and right of the last
_ROW, _GAP = 5.35, 1.25  # inches: a row of panels and the gap in it
_HEAD, _FOOT, _LINE = 1.35, 0.8, 0.24  # inches: above and below the panels, and of a line below those
_ABREAST = 3  # sketches side by side, where there are more than two


def save(pattern: Pattern, length: int, path: Path) -> None:
    """Writes the picture: mask and tiles of each softmax, stream and differing head. Raises OSError.

    One or two sketches are rows, tiles at the right of the mask; more are columns, tiles below it.
    """
    found, notes = sketches(pattern, length)
    places = _places(len(found))
    columns, rows = (1 + max(place[axis] for pair in places for place in pair) for axis in (1, 0))
    width, height = columns * _COLUMN, _HEAD + _ROW * rows - _GAP + _FOOT + _LINE * len(notes)
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        rows, columns, squeeze=False,
        gridspec_kw={
            "left": _LEFT / width, "right": 1 - _RIGHT / width,
            "top": 1 - _HEAD / height, "bottom": (_FOOT + _LINE * len(notes)) / height,
            "wspace": 0.22, "hspace": _GAP / (_ROW - _GAP),
        },
    )  # fmt: skip
    for panel in axes.flat:
        panel.set_visible(False)
    _title(figure, pattern, length)
    for (mask, tiles), sketch in zip(places, found, strict=True):
        _mask(axes[mask], pattern, sketch, length)
        _tiles(axes[tiles], sketch, length)
    for i, line in enumerate(reversed(notes)):
        figure.text(_LEFT / width, (0.16 + _LINE * i) / height, line, color=QUIET, fontsize=9, style="italic")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})


def _places(sketches: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(row, column) of the mask and of the tiles of each sketch."""
    if sketches < _ABREAST:
        return [((i, 0), (i, 1)) for i in range(sketches)]
    places = [(i // _ABREAST * 2, i % _ABREAST) for i in range(sketches)]
    return [((row, column), (row + 1, column)) for row, column in places]


def _title(figure: Figure, pattern: Pattern, length: int) -> None:
    width, height = figure.get_size_inches()
    left = _LEFT / width
    figure.text(left, 1 - 0.36 / height, pattern.name, color=INK, fontsize=16, weight="bold", va="center")
    parts = [heading(pattern), "causal" if pattern.causal else "", f"{length} queries and keys"]
    figure.text(left, 1 - 0.62 / height, "   ".join(filter(None, parts)), color=QUIET, fontsize=10, va="center")


def _mask(axes: Axes, pattern: Pattern, sketch: Sketch, length: int) -> None:
    shown, entries = sketch.mask.long(), [(VISIBLE, "visible"), (HIDDEN, "hidden")]
    remark = f"sparsity {sketch.sparsity:.1%}"
    if sketch.example is not None:
        shown = shown + sketch.example.long()
        entries = [(VISIBLE, "certain"), (EXAMPLE, "example"), (HIDDEN, "hidden")]
    colours = ListedColormap([HIDDEN, VISIBLE, EXAMPLE])
    side = len(shown) * sketch.step
    axes.imshow(shown.numpy(), cmap=colours, vmin=0, vmax=2, interpolation="nearest", extent=(0, side, side, 0))
    name = ", ".join(filter(None, (sketch.name, "" if sketch.head is None else f"head {sketch.head}")))
    _frame(axes, length, name or "visible keys")
    if sketch.example is None:
        remark += " of the causal pairs" if pattern.causal else " of the pairs"
    _key(axes, entries, remark)


def _tiles(axes: Axes, sketch: Sketch, length: int) -> None:
    states = sketch.states()
    side = len(states) * sketch.tile
    colours = ListedColormap(list(TILES.values()))
    axes.imshow(states.numpy(), cmap=colours, vmin=0, vmax=2, interpolation="nearest", extent=(0, side, side, 0))
    if len(states) <= 64:
        lines = range(0, side + 1, sketch.tile)
        axes.hlines(lines, 0, side, color="white", linewidth=0.6)
        axes.vlines(lines, 0, side, color="white", linewidth=0.6)
    _frame(axes, length, f"tiles of {sketch.tile} x {sketch.tile}")
    entries = [
        (colour, f"{name} {percent((states == state).double().mean().item())}")
        for state, (name, colour) in enumerate(TILES.items())
    ]
    _key(axes, entries[::-1], "")


def _frame(axes: Axes, length: int, title: str) -> None:
    axes.set_visible(True)
    axes.set_title(title, color=INK, fontsize=11, loc="left", pad=26)
    axes.set_xlim(0, length)
    axes.set_ylim(length, 0)
    axes.set_xlabel("key position", color=QUIET)
    axes.set_ylabel("query position", color=QUIET)
    ticks = [length * i // 4 for i in range(5)]
    axes.set_xticks(ticks)
    axes.set_yticks(ticks)
    axes.tick_params(colors=QUIET, length=3, labelsize=9)
    for spine in axes.spines.values():
        spine.set_color("#c5ccd6")


def _key(axes: Axes, entries: list[tuple[str, str]], remark: str) -> None:
    """The legend above a panel, a remark at its right."""
    patches = [Patch(facecolor=colour, edgecolor="#c5ccd6", linewidth=0.6, label=label) for colour, label in entries]
    axes.legend(
        handles=patches, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=len(entries), frameon=False,
        fontsize=9, labelcolor=QUIET, handlelength=1.1, handleheight=1.1, columnspacing=1.2, borderaxespad=0.3,
    )  # fmt: skip
    axes.text(1, 1.022, remark, transform=axes.transAxes, ha="right", va="bottom", color=INK, fontsize=9)
