"""plot: time over length, of the pattern and of dense attention, one panel for each phase."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from spdsl.cost.crossing import told
from spdsl.cost.estimate import Curve
from spdsl.cost.report import duration, sizes

OWN, DENSE, INK, QUIET, GRID = "#1f6fb2", "#e09f3e", "#1b2430", "#66707d", "#e4e8ee"
_PANEL, _HEIGHT, _HEAD = 4.6, 4.1, 1.0  # inches


def save(name: str, curves: Sequence[Curve], path: Path) -> None:
    """Writes a PNG. Raises OSError."""
    columns = min(2, len(curves))
    rows = -(-len(curves) // columns)
    width, height = columns * _PANEL + 0.4, rows * _HEIGHT + _HEAD
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        rows, columns, squeeze=False,
        gridspec_kw={
            "left": 0.85 / width, "right": 1 - 0.3 / width, "top": 1 - (_HEAD + 0.3) / height,
            "bottom": 0.65 / height, "wspace": 0.28, "hspace": 0.42,
        },
    )  # fmt: skip
    for panel, curve in zip(axes.flat, curves, strict=False):
        _panel(panel, curve)
    for panel in list(axes.flat)[len(curves) :]:
        panel.set_visible(False)
    left = 0.85 / width
    title = f"{name} on {curves[0].target.title}"
    figure.text(left, 1 - 0.36 / height, title, color=INK, fontsize=15, weight="bold", va="center")
    figure.text(left, 1 - 0.64 / height, f"estimated; {sizes(curves[0].shape)}", color=QUIET, fontsize=9, va="center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})


def _panel(axes: Axes, curve: Curve) -> None:
    lengths = [point.length for point in curve.points]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.plot(lengths, [point.dense for point in curve.points], color=DENSE, linewidth=2, label="dense")
    label = "pattern" if all(point.exact for point in curve.points) else "pattern, at most"
    axes.plot(lengths, [point.seconds for point in curve.points], color=OWN, linewidth=2, label=label)
    for change in curve.crossings:
        axes.axvline(change.length, color=QUIET, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set_title(curve.stage.value, color=INK, fontsize=12, loc="left", pad=20)
    remark = told(curve.crossings, curve.wins_first, lengths)
    axes.text(0, 1.02, remark, transform=axes.transAxes, color=QUIET, fontsize=8.5, va="bottom")
    axes.set_xticks(lengths[:: max(1, len(lengths) // 5)])
    axes.xaxis.set_major_formatter(lambda value, _: _tokens(value))
    axes.yaxis.set_major_formatter(lambda value, _: duration(value))
    axes.minorticks_off()
    axes.set_xlabel("tokens", color=QUIET)
    axes.grid(True, color=GRID, linewidth=0.7)
    axes.tick_params(colors=QUIET, length=3, labelsize=9)
    for spine in axes.spines.values():
        spine.set_color("#c5ccd6")
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower right")


def _tokens(value: float) -> str:
    if value >= 1 << 20:
        return f"{value / (1 << 20):g}M"
    return f"{value / 1024:g}k" if value >= 1024 else f"{value:g}"
