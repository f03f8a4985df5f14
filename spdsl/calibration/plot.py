"""The curves of a calibration and its line as a PNG, by matplotlib without a display."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from spdsl.calibration.fit import Calibration, Curve

_POINTS = 200


def save(found: Calibration, curves: Sequence[Curve], path: Path, title: str) -> None:
    """Left level x length by sparsity, beside the line; right what one fixed level leaves out at each length, and what
    the line's levels do. Raises OSError.
    """
    figure = Figure(figsize=(11, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    figure.suptitle(title)
    for curve in curves:
        own = [(s, scale) for length, s, scale in found.points if length == curve.length]
        left.plot([s for s, _ in own], [math.exp(scale) for _, scale in own], ".", label=f"{curve.length:,} tokens")
    shares = [i / _POINTS for i in range(_POINTS + 1)]
    left.plot(shares, [found.scale(s) for s in shares], color="#1b2430", linewidth=1, label="a exp(b s)")
    left.set(xlabel="sparsity", ylabel="level x length", yscale="log", title="the line")
    left.legend(fontsize="small")
    lengths = [curve.length for curve in curves]
    fixed = found.scale(0.5) / lengths[len(lengths) // 2]
    right.plot(lengths, [curve.sparsity(fixed) for curve in curves], "o--", label=f"level {fixed:.2g} at every length")
    right.plot(lengths, list(found.reached(curves, 0.5).values()), "o-", label="level = a exp(b / 2) / length")
    right.set(xlabel="tokens", ylabel="sparsity", xscale="log", ylim=(0, 1), title="half of the tiles, wanted")
    right.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})
