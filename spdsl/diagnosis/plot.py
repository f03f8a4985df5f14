"""The heat map of a diagnosis as a PNG, by matplotlib without a display."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from spdsl.diagnosis.record import Diagnosis
from spdsl.diagnosis.table import title
from spdsl.picture.plot import EXAMPLE, HIDDEN, INK, QUIET, VISIBLE

_MAP = LinearSegmentedColormap.from_list("lost", [HIDDEN, EXAMPLE, "#c8452b", VISIBLE])
_LEAST = 1e-4  # of the mass of a query: less looks like none


def save(found: Diagnosis, path: Path) -> None:
    """Where the unread mass lies; and of each layer and head what it keeps and misses. Raises OSError."""
    figure = Figure(figsize=(13.6, 5.4), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3, gridspec_kw={"left": 0.06, "right": 0.97, "top": 0.8, "bottom": 0.11, "wspace": 0.3})
    params = ", ".join(f"{name} = {value}" for name, value in found.params.items())
    figure.text(0.06, 0.945, found.pattern, color=INK, fontsize=16, weight="bold", va="center")
    figure.text(0.06, 0.895, "   ".join(filter(None, (params, title(found)))), color=QUIET, fontsize=10, va="center")
    _lost(axes[0], found)
    _grid(axes[1], found, "missed", "critical keys that the head does not read")
    _grid(axes[2], found, "missed_by_group", "critical keys that no head of the group reads")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})


def _lost(axes: Axes, found: Diagnosis) -> None:
    side = len(found.lost) * found.step
    shown = found.lost.clamp(min=_LEAST).numpy()
    image = axes.imshow(shown, cmap=_MAP, norm=LogNorm(_LEAST, 1), interpolation="nearest", extent=(0, side, side, 0))
    _frame(axes, f"dense mass that a query does not read, by tile of {found.step}", "key position", "query position")
    _bar(axes, image)


def _grid(axes: Axes, found: Diagnosis, name: str, what: str) -> None:
    heads = len({one.head for one in found.whole})
    shares = torch.zeros(len(found.layers), heads)
    for one in found.whole:
        shares[found.layers.index(one.layer), one.head] = getattr(one, name)
    image = axes.imshow(shares.numpy(), cmap=_MAP, norm=Normalize(0, 1), interpolation="nearest", aspect="auto")
    _frame(axes, what, "head", "layer")
    axes.set_xticks(range(0, heads, -(-heads // 16)))
    axes.set_yticks(range(0, len(found.layers), -(-len(found.layers) // 16)))
    axes.set_yticklabels([str(layer) for layer in found.layers[:: -(-len(found.layers) // 16)]])
    _bar(axes, image)


def _bar(axes: Axes, image: AxesImage) -> None:
    figure = axes.figure
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    bar.ax.tick_params(colors=QUIET, labelsize=8, length=2)
    bar.outline.set_edgecolor("#c5ccd6")


def _frame(axes: Axes, heading: str, across: str, down: str) -> None:
    axes.set_title(heading, color=INK, fontsize=10, loc="left", pad=8)
    axes.set_xlabel(across, color=QUIET)
    axes.set_ylabel(down, color=QUIET)
    axes.tick_params(colors=QUIET, length=3, labelsize=9)
    for spine in axes.spines.values():
        spine.set_color("#c5ccd6")
