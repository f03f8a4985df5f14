"""The table and the picture of docs/smollm.md, from measured results as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from examples.llama.text import EACH

Result = dict[str, Any]
BEGIN, END = "<!-- results -->", "<!-- end of results -->"


def read(path: Path) -> Result:
    found: Result = json.loads(path.read_text(encoding="utf-8"))
    return found


def table(results: Result) -> str:
    """A table for each length, in the order of the runs."""
    parts = []
    for length in dict.fromkeys(row["length"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["length"] == length]
        parts.append(f"**{length:,} tokens**, loss of the last {rows[0]['tail']}\n\n{_of_length(rows)}")
    return "\n\n".join([*parts, _conditions(results)])


def _of_length(rows: list[Result]) -> str:
    lines = ["| attention | loss | - dense | needles | by depth | sparsity | mass kept | critical keys missed |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    dense = next((row["loss"] for row in rows if row["name"] == "dense"), None)
    for row in rows:
        more = "" if dense is None else f"{row['loss'] - dense:+.4f}"
        found = f"{sum(row['needles'])} of {EACH * len(row['needles'])}"
        depths = " ".join(map(str, row["needles"]))
        shares = (f"{100 * row[name]:.1f} %" for name in ("sparsity", "kept", "missed"))
        cells = [row["title"], f"{row['loss']:.4f}", more, found, depths, *shares]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _conditions(results: Result) -> str:
    return (
        f"Text: {results['text']}. {results['versions']}, {results['threads']} thread"
        f"{'s' * (results['threads'] != 1)}. Largest difference between dense and causal in log-probability: "
        f"{results['difference']:.1e}."
    )


def written(page: str, results: Result) -> str:
    """The page with the tables between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table(results)}\n\n{END}{after}"


def draw(results: Result, path: Path) -> None:
    """Losses beside the first one's, and needles by depth, a row of panels for each length."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lengths = list(dict.fromkeys(row["length"] for row in results["rows"]))
    figure = Figure(figsize=(11, 0.9 + 2.9 * len(lengths)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(lengths), 2, squeeze=False)
    for (left, right), length in zip(panels, lengths, strict=True):
        rows = [row for row in results["rows"] if row["length"] == length]
        titles = [row["title"] for row in rows]
        left.plot([row["loss"] for row in rows[::-1]], titles[::-1], "o", color="#1f6fb2")
        left.axvline(rows[0]["loss"], color="#c5ccd6", linewidth=1, zorder=0)
        left.margins(x=0.1, y=0.2)
        left.set(xlabel="nats per token", title=f"loss of the last {rows[0]['tail']} of {length:,} tokens")
        right.imshow([row["needles"] for row in rows], vmin=0, vmax=EACH, cmap="Blues", aspect="auto")
        right.set_yticks(range(len(rows)), titles)
        right.set_xticks(range(len(rows[0]["needles"])))
        right.set(xlabel="depth, in eighths of the context", title=f"needles found, of {EACH} at each depth")
        for y, row in enumerate(rows):
            for x, number in enumerate(row["needles"]):
                right.text(x, y, number, ha="center", va="center", color="white" if number > EACH / 2 else "#1b2430")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})
