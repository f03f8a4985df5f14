"""What the runs of a folder came to: a picture of their losses and a table."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from examples.lm.checkpoint import read_lines

CURVE = "curve.jsonl"
SMOOTHED = 20  # steps of training that one point of a curve is the mean of

Line = dict[str, Any]


def draw(folder: Path, console: Console) -> None:
    """`loss.png` of all runs below `folder`: training losses as lines, held-out losses as marks."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        console.print("No picture of the losses: matplotlib is not installed (pip install 'spdsl[pictures]').")
        return
    curves = by_name([read_lines(path) for path in sorted(folder.glob(f"*/{CURVE}"))])
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, (name, runs) in enumerate(curves.items()):
        for run, lines in enumerate(runs):
            look = {"color": f"C{number % 10}", "label": name if run == 0 else None}
            tests = {line["step"]: line["test"] for line in lines if "test" in line}
            axes.plot(*smooth([line["loss"] for line in lines if "loss" in line]), linewidth=0.8, alpha=0.6, **look)
            axes.plot(list(tests), list(tests.values()), "o", markersize=4, color=look["color"])
    axes.set(xlabel="step", ylabel="loss, nats per byte", title=f"Training (mean of {SMOOTHED} steps) and held out (o)")
    axes.grid(alpha=0.3)
    if curves:
        axes.legend(fontsize="small")
    figure.savefig(folder / "loss.png", dpi=150)
    console.print(f"wrote {folder / 'loss.png'}")


def by_name(curves: list[list[Line]]) -> dict[str, list[list[Line]]]:
    """The first line of a curve names its run."""
    named: dict[str, list[list[Line]]] = defaultdict(list)
    for first, *rest in curves:
        named[first["name"]].append(rest)
    return named


def smooth(losses: list[float]) -> tuple[list[int], list[float]]:
    """Steps and the means of the losses up to each."""
    steps = list(range(1, len(losses) + 1))
    return steps, [mean(losses[max(0, step - SMOOTHED) : step]) for step in steps]


def table(results: list[Line]) -> Table:
    """Means over the seeds; the ratio is to `dense`, or to the first where there is none, over the seeds of both."""
    groups: dict[str, dict[int, Line]] = defaultdict(dict)
    for line in results:
        groups[line["name"]][line["seed"]] = line
    base = "dense" if "dense" in groups else next(iter(groups), "")
    made = Table("pattern", *(Column(name, no_wrap=True) for name in ("seeds", "loss", "range", "ratio", "tokens/s")))
    made.add_column("weights", no_wrap=True)
    for name, runs in groups.items():
        losses = [line["loss"] for line in runs.values()]
        made.add_row(
            name,
            ",".join(str(seed) for seed in runs),
            f"{mean(losses):.4f}",
            f"{min(losses):.3f}-{max(losses):.3f}",
            ratio(runs, groups[base]),
            f"{mean(line['tokens_per_second'] for line in runs.values()):,.0f}",
            f"{next(iter(runs.values()))['parameters']:,}",
        )
    made.caption = f"loss: held-out text, last step, nats per byte; ratio: to {base}; tokens/s: training steps alone"
    if len({json.dumps(line["budget"], sort_keys=True) for line in results}) > 1:
        made.caption += "\nThese runs had different budgets: their losses do not compare."
    return made


def ratio(runs: dict[int, Line], base: dict[int, Line]) -> str:
    seeds = runs.keys() & base.keys()
    if not seeds:
        return "-"
    return f"{mean(runs[seed]['loss'] for seed in seeds) / mean(base[seed]['loss'] for seed in seeds):.4f}"
