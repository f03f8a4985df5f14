"""Rows of results as lines, as a short table and as Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.patterns import Case


def file_name(device: Case) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device["name"].lower()).strip("-")


def label(row: Case) -> str:
    """`sliding_window 1024, D 128, 32k`"""
    window = row.get("params", {}).get("window", "")
    shape = [f"{row.get('pattern', row['kind'])} {window}".strip()]
    shape += [f"B {row['batch']}"] if row.get("batch", 1) > 1 else []
    shape += [f"D {row['dim']}"] if "dim" in row else []
    shape += (
        [f"{row['tokens'] // 1024}k" if row["tokens"] % 1024 == 0 else str(row["tokens"])] if "tokens" in row else []
    )
    return ", ".join(shape)


def line(row: Case) -> str:
    what = " ".join(str(row[name]) for name in ("kind", "backend", "dtype", "kernel", "config", "page") if name in row)
    found = {
        name: row[name]
        for name in row
        if name.endswith(("_ms", "_s")) or name in ("worst", "of", "difference", "failure")
    }
    values = ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in found.items()
    )
    return f"{label(row)}: {what}: {values}"


def summary(results: Case) -> str:
    """At most a hundred lines: what failed, the times, the steps of decode."""
    checks, device = results["checks"], results["device"]
    good = sum(row.get("ok", False) for row in checks)
    lines = [" ".join(f"{name} {value}" for name, value in device.items())]
    lines += [f"numerics: {good} of {len(checks)} pass"]
    bad = [row for row in checks + results["times"] if not row.get("ok", "failure" not in row)]
    unreached = [row for row in bad if row.get("failure", "").startswith("not reached")]
    lines += ["  " + line(row) for row in bad if row not in unreached][:30]
    lines += [f"  and {len(unreached)} cases not reached"] if unreached else []
    return "\n".join([*lines, *plain(attend_rows(results)), "", *plain(decode_rows(results))])


def attend_rows(results: Case) -> list[list[str]]:
    """ours, FlexAttention and SDPA in milliseconds, forward / backward, and the quotients to FlexAttention."""
    times = [row for row in results["times"] if "forward_ms" in row]
    dense = {(r["dim"], r["tokens"], r["backend"]): r for r in times if r["kind"] == "sdpa"}
    flex = {label(r): r for r in times if r["kind"] == "flex"}
    head = ["pattern", "ours fwd / bwd ms", "Flex", "dense flash", "dense cuDNN", "x Flex"]
    rows = [head]
    for row in (r for r in times if r["kind"] == "ours"):
        other = flex.get(label(row))
        ratio = f"{quotient(other, row, 'forward_ms')} / {quotient(other, row, 'backward_ms')}" if other else ""
        backends = [dense.get((row["dim"], row["tokens"], name)) for name in ("flash", "cudnn")]
        rows.append([label(row), *(pair(r) for r in (row, other, *backends)), ratio])
    return rows


def pair(row: Case | None) -> str:
    return f"{row['forward_ms']:.3g} / {row['backward_ms']:.3g}" if row else ""


def quotient(other: Case, row: Case, name: str) -> str:
    return f"{other[name] / row[name]:.2f}" if row[name] else ""


def decode_rows(results: Case) -> list[list[str]]:
    """A step in microseconds, of which appending, and the share of the copy bandwidth that reading the keys reaches."""
    copy = next((row["copy_gb_s"] for row in results["times"] if "copy_gb_s" in row), None)
    rows = [["decode step", "by", "us", "append us", "keys MiB", "of copy bandwidth", "without append"]]
    for row in (r for r in results["times"] if "step_ms" in r):
        by = f"ours, page {row['page']}" if row["kind"] == "decode" else f"SDPA {row['backend']}"
        append = row.get("append_ms", 0.0)
        cells = [f"{row['step_ms'] * 1e3:.1f}", f"{append * 1e3:.1f}", f"{row['kv_bytes'] / 2**20:.0f}"]
        rows.append([label(row), by, *cells, reached(row, copy, 0.0), reached(row, copy, append)])
    return rows


def reached(row: Case, copy: float | None, less: float) -> str:
    spent = row["step_ms"] - less
    return f"{row['kv_bytes'] / spent * 1e3 / (copy * 1e9):.0%}" if copy and spent > 0 else ""


def best(rows: list[Case], count: int = 5) -> str:
    """The fastest configurations of one kernel, and what the module has."""
    good = [row for row in rows if row.get("kernel_ms")]
    own = next((row for row in rows if row.get("kernel_ms") is not None), None)
    ranked = sorted(good, key=lambda row: float(row["kernel_ms"]))[:count]
    failed = [row for row in rows if "failure" in row]
    lines = [f"{rows[0]['kernel']}, {label(rows[0])}: {len(good)} of {len(rows)} ran (block_m, block_n, warps, stages)"]
    lines += [f"  now  {own['config']}: {own['kernel_ms']:.4g} ms"] if own else []
    lines += [f"  {row['kernel_ms']:9.4g} ms {row['config']}" for row in ranked]
    return "\n".join(lines + [f"  failed: {row['config']}: {row['failure'][:100]}" for row in failed[:3]])


def plain(rows: list[list[str]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def markdown(results: Case) -> str:
    parts = ["; ".join(f"{name} {value}" for name, value in results["device"].items())]
    for rows in (attend_rows(results), decode_rows(results)):
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        parts.append("\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]))
    return "\n\n".join(parts) + "\n"


def write(path: Path, results: Case) -> None:
    """`path` gets JSON, `path` with the ending .md the tables."""
    write_json(path, results)
    path.with_suffix(".md").write_text(markdown(results), encoding="utf-8")


def write_json(path: Path, results: Case) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
