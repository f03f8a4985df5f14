"""Rows of results as lines, a summary and Markdown: checks, branches with TFLOP/s, decode steps with the bandwidth."""

from __future__ import annotations

from benchmarks.gpu import table as plain
from benchmarks.gpu.patterns import Case

KERNELS = {
    "coarse": ["coarse"],
    "scored": ["coarse", "chosen"],
    "select": ["chosen"],
    "fine": ["fine"],
    "near": ["near"],
    "entries": ["entries"],
    "whole": ["entries", "coarse", "chosen", "fine", "near"],
    "dense": ["dense"],
}
FORWARD = {"chosen": "select", "entries": "compress"}  # the others are called forward


def label(row: Case) -> str:
    """`64k, D 192/128`"""
    tokens = f"{row['tokens'] // 1024}k" if row["tokens"] % 1024 == 0 else str(row["tokens"])
    dims = f"{row['dim']}" if row["dim"] == row["v_dim"] else f"{row['dim']}/{row['v_dim']}"
    batch = f", B {row['batch']}" if row.get("batch", 1) > 1 else ""
    return f"{tokens}, D {dims}{batch}"


def what(row: Case) -> str:
    """`ours: fine, clustered lists`"""
    kind = row["kind"].removeprefix("nsa_")
    who = row.get("peer") or (f"SDPA {row['backend']}" if "backend" in row else "ours")
    if kind == "loop":
        heads = row["heads"] // row["kv_heads"]
        return f"ours: {row['outer']} outermost, {heads} heads a list, {row['lists']} lists"
    part = row.get("branch") or {"dense": "dense", "dense_decode": "dense"}.get(kind, kind)
    lists = f", {row['lists']} lists" if row.get("lists", "own") != "own" else ""
    return f"{who}: {part}{lists}" + (", by mean" if row.get("by") == "mean" else "")


def line(row: Case) -> str:
    if "tokens" not in row:
        return plain.line(row)
    names = (
        "forward_ms",
        "backward_ms",
        "step_ms",
        "worst",
        "of",
        "kv_tokens",
        "absent",
        "failure",
        "backward_failure",
    )
    found = [
        f"{name} {row[name]:.4g}" if isinstance(row[name], float) else f"{name} {row[name]}"
        for name in names
        if name in row
    ]
    return f"{label(row)}: {what(row)}: {', '.join(found)}"


def counts(results: Case) -> dict[str, Case]:
    return {label(row): row for row in results["times"] if "flops" in row}


def shape(row: Case) -> str:
    return label({name: row[name] for name in ("tokens", "dim", "v_dim")})


def flops(row: Case, known: dict[str, Case], way: str) -> float | None:
    """Exact FLOPs of what the row computes; None for peers' and for what was not counted."""
    kind = row["kind"].removeprefix("nsa_")
    count = known.get(shape(row))
    names = KERNELS.get(row.get("branch", kind)) if count and "peer" not in row and row.get("by") != "mean" else None
    if count is None or names is None:
        return None
    if way == "backward":
        total = sum(count["flops"].get(f"{name}_backward", 0) for name in names)
    else:
        passed = [name for name in names if not (name == "chosen" and row.get("lists", "own") != "own")]
        total = sum(count["flops"].get(f"{name}_{FORWARD.get(name, 'forward')}", 0) for name in passed)
    return float(total) or None


def dense_of(results: Case, key: str) -> dict[str, float]:
    """The fastest dense time of each shape."""
    best: dict[str, float] = {}
    for row in results["times"]:
        if row["kind"].startswith("nsa_dense") and row.get(key):
            best[label(row)] = min(best.get(label(row), float("inf")), row[key])
    return best


def attend_rows(results: Case) -> list[list[str]]:
    """Milliseconds, the quotient of the fastest dense one and this, and TFLOP/s of the visible pairs."""
    known = counts(results)
    dense = {way: dense_of(results, f"{way}_ms") for way in ("forward", "backward")}
    rows = [
        ["shape", "what", "forward ms", "backward ms", "dense / this", "forward TFLOP/s", "backward TFLOP/s", "MiB"]
    ]
    for row in results["times"]:
        if "forward_ms" not in row and not failed(row):
            continue
        ratio = " / ".join(quotient(dense[way].get(label(row)), row.get(f"{way}_ms")) for way in dense)
        rates = [rate(flops(row, known, way), row.get(f"{way}_ms")) for way in dense]
        times = [ms(row.get("forward_ms"), row.get("failure")), ms(row.get("backward_ms"), row.get("backward_failure"))]
        rows.append(
            [label(row), what(row), *times, ratio, *rates, f"{row['peak_mib']:.0f}" if "peak_mib" in row else ""]
        )
    return rows


def failed(row: Case) -> bool:
    return "failure" in row and row["kind"] in ("nsa_whole", "nsa_branch", "nsa_dense", "nsa_peer", "nsa_loop")


def decode_rows(results: Case) -> list[list[str]]:
    """Microseconds of a step, KV tokens by the exact count, and the share of the copy bandwidth that reading takes."""
    copy = next((row["copy_gb_s"] for row in results["times"] if "copy_gb_s" in row), None)
    known, dense = counts(results), dense_of(results, "step_ms")
    rows = [["shape", "decode step", "us", "dense / this", "KV tokens", "as published", "KV MiB", "of copy bandwidth"]]
    for row in results["times"]:
        if row["kind"] not in ("nsa_decode", "nsa_dense_decode"):
            continue
        count = known.get(shape(row))
        own = row["kind"] == "nsa_decode"
        size = count[("kv_bytes" if own else "dense_bytes")] * row.get("batch", 1) if count else None
        spent = row.get("step_ms")
        reached = f"{2 * size / spent * 1e3 / (copy * 1e9):.0%}" if size and spent and copy else ""
        keys = [str(count["kv_tokens"]), count["published"]] if count and own else [str(row["tokens"]), ""]
        rows.append([
            label(row), what(row), ms(spent and spent * 1e3, row.get("failure")),
            quotient(dense.get(label(row)), spent), *keys, f"{size / 2**20:.1f}" if size else "", reached,
        ])  # fmt: skip
    return rows


def ms(value: float | None, failure: str | None) -> str:
    return f"{value:.4g}" if value is not None else (failure or "")[:60]


def quotient(other: float | None, own: float | None) -> str:
    return f"{other / own:.2f}" if other and own else "-"


def rate(number: float | None, milliseconds: float | None) -> str:
    return f"{number / milliseconds / 1e9:.0f}" if number and milliseconds else ""


def summary(results: Case) -> str:
    checks = results["checks"]
    good = sum(bool(row.get("ok")) for row in checks)
    lines = [
        " ".join(f"{name} {value}" for name, value in results["device"].items()),
        f"checks: {good} of {len(checks)} pass",
    ]
    lines += ["  " + line(row) for row in checks if not row.get("ok")]
    absent = sorted({row["absent"] for row in results["times"] if "absent" in row})
    unreached = sum(row.get("failure", "").startswith("not reached") for row in results["times"])
    lines += [f"  {text}" for text in absent] + ([f"  {unreached} cases not reached"] if unreached else [])
    shown = {
        **results,
        "times": [row for row in results["times"] if not row.get("failure", "").startswith("not reached")],
    }
    return "\n".join([*lines, *plain.plain(attend_rows(shown)), "", *plain.plain(decode_rows(shown))])


def markdown(results: Case) -> str:
    parts = ["; ".join(f"{name} {value}" for name, value in results["device"].items())]
    parts.append("\n".join(f"- {line(row)}{'' if row.get('ok') else ' **wrong**'}" for row in results["checks"]))
    for rows in (attend_rows(results), decode_rows(results)):
        lines = ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]
        parts.append("\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]))
    return "\n\n".join(parts) + "\n"
