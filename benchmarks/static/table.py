"""Rows as Markdown: what the machine code is, what a useful pair costs, and the bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from benchmarks.static import bounds
from benchmarks.static.bounds import Cost, cost
from benchmarks.static.code import Code, LoopCode
from benchmarks.static.demand import TOKENS
from benchmarks.static.rows import AGREEMENTS, Row
from spdsl.targets import Target

SHOWN = 0.8  # the agreement of the bounds that are shown one by one
FAR = 1.2
CODE = (
    "kernel", "dims", "of", "tile", "warps, stages", "registers", "spills in / out of loops", "shared KiB", "blocks/SM",
    "matrix instructions", "computed", "copies", "barriers, fences", "instructions of the loops", "slots", "B",
)  # fmt: skip
WRITTEN = (  # what recorded figures call the columns of code
    "tile", "warps_stages", "registers", "spills", "shared", "blocks", "matrix", "times", "copies", "barriers",
    "instructions", "slots", "bytes",
)  # fmt: skip
USEFUL = ("kernel", "dims", "of", "multiplied for each useful pair", "slots", "B")
BOUNDS = ("kernel", "dims", "of", *bounds.NAMES, "serial", "bound", "of the least")
FARTHEST = (
    "kernel", "dims", "of the least", "bound", "least", "multiplied for each useful pair", "loops: slots", "best peer",
)  # fmt: skip
OTHERS = ("kernel", "patterns", "warps", "registers", "spills in / out of loops", "shared KiB", "blocks/SM")
HEAD = """# Kernels in machine code

{target}, triton {triton} with ptxas {ptxas}, torch {torch}; made by `python -m benchmarks.run --suite static`. Nothing
ran: these are counts of instructions and bytes, and bounds that follow from them, no times. How to read it:
`benchmarks/NOTES.md`, "Static suite".
"""
PARTS = {
    "Machine code": "One iteration of each innermost loop with matrix instructions; *slots*: warp instructions, *B*: "
    "bytes loaded, for each pair of a query head and a key that it multiplies.",
    "A useful pair": "Where neighbouring queries choose alike by 100, 80, 50 and 0 %.",
    "Bounds": f"Milliseconds at {TOKENS // 1024}k tokens, one sequence: each at 80 %, *serial* if none overlaps; the "
    "greatest at 100, 80, 50 and 0 %; and how many times the least that the call needs that is at 80 %: useful pairs "
    "once, or each tensor once.",
    "Farthest from the least": "Ours, by how many times what the call needs at least their greatest bound is at 80 %; "
    f"from {FAR} on, decode steps left out. Milliseconds, as above.",
    "Kernels without pairs": "Those whose products, if any, are not of a query head and a key.",
}


def markdown(rows: Sequence[Row], versions: Mapping[str, str], target: Target) -> str:
    """Everything."""
    paired = [row for row in in_groups(rows) if row.demand or row.recorded]
    others = sorted((row for row in rows if not row.demand and not row.recorded), key=lambda row: row.kernel)
    tables = (
        (CODE, map(code_cells, paired)),
        (USEFUL, (useful_cells(row) for row in paired if row.cost)),
        (BOUNDS, (bound_cells(row, target) for row in paired if row.bounds(SHOWN, target))),
        (FARTHEST, farthest(paired, target)),
        (OTHERS, map(other_cells, others)),
    )
    parts = [HEAD.format(target=target.title, **versions)]
    for (title, text), (head, cells) in zip(PARTS.items(), tables, strict=True):
        parts.append(f"## {title}\n\n{text}\n\n{grid(head, cells)}\n")
    return "\n".join(parts)


def in_groups(rows: Sequence[Row]) -> Iterator[Row]:
    """Ours by form, each with those of peers behind it."""
    own = sorted(
        (row for row in rows if row.of == "ours"), key=lambda row: (row.form, row.kernel, row.pattern, row.dtype)
    )
    peers = [row for row in rows if row.of != "ours"]
    for row in own:
        yield row
        yield from (peer for peer in peers if peer.stands_beside(row))


def grid(head: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in cells)])


def named(row: Row) -> list[str]:
    """Kernel, dims and whose it is."""
    kernel = f"{row.form or 'kernel'}: {row.pattern} {row.kernel}" if row.of == "ours" else row.kernel
    also = (" in prefill" if row.phase == "prefill" else "") + (f" ({', '.join(row.also)})" if row.also else "")
    dims = f"{row.dims[0]}" if row.dims[0] == row.dims[1] else "/".join(map(str, row.dims))
    mark = " (recorded)" if row.recorded else " (kept)" if row.kept else ""
    return [kernel + also, dims + (f" {row.dtype}" if row.dtype != "bf16" else ""), row.of + mark]


def code_cells(row: Row) -> list[str]:
    if row.recorded:
        return [*named(row), *(str(row.recorded.get(name, "")) for name in WRITTEN)]
    code = row.code
    if code is None:
        return [*named(row), row.error, *[""] * (len(CODE) - 4)]
    loops = code.loops
    return [
        *named(row), each(loops, lambda loop: "x".join(map(str, loop.tile))), f"{code.warps}, {code.stages}",
        str(code.registers), spills(code), f"{code.shared / 1024:.0f}", f"{code.blocks} ({code.limit})",
        each(loops, lambda loop: f"{loop.matrix}") + f" {', '.join(code.matrix)}", f"{code.times}x",
        each(loops, lambda loop: f"{loop.copies}") + f" {', '.join(code.copies)}" if code.copies else "none",
        each(loops, lambda loop: f"{loop.barriers}, {loop.fences}", "; "),
        each(loops, lambda loop: f"{loop.instructions}"), costs(row, lambda one: number(one.slots)),
        costs(row, lambda one: number(one.loaded)),
    ]  # fmt: skip


def useful_cells(row: Row) -> list[str]:
    one, factors = row.cost, [row.waste(agreement) for agreement in AGREEMENTS]
    assert one is not None
    return [
        *named(row), joined(factors), joined([factor * one.slots for factor in factors]),
        joined([factor * one.loaded for factor in factors]),
    ]  # fmt: skip


def bound_cells(row: Row, target: Target) -> list[str]:
    found = [row.bounds(agreement, target) or {} for agreement in AGREEMENTS]
    shown = found[AGREEMENTS.index(SHOWN)]
    greatest = [max(one.values()) for one in found]
    return [
        *named(row), *(milliseconds(shown[name]) for name in bounds.NAMES), milliseconds(bounds.serial(shown)),
        f"{' / '.join(dict.fromkeys(map(milliseconds, greatest)))} ({bounds.binding(shown)})",
        f"{far(row, target):.1f}x",
    ]  # fmt: skip


def farthest(rows: Sequence[Row], target: Target) -> Iterator[list[str]]:
    own = [row for row in rows if row.of == "ours" and "decode" not in row.form and row.bounds(SHOWN, target)]
    for row in sorted(own, key=lambda one: -far(one, target)):
        if far(row, target) >= FAR and row.code is not None:
            found = row.bounds(SHOWN, target) or {}
            peers = [one for one in rows if one.stands_beside(row)]
            best = min(peers, key=lambda one: bound(one, target), default=None)
            kernel, dims, _ = named(row)
            shown = f"{milliseconds(max(found.values()))} ({bounds.binding(found)})"
            yield [
                kernel, dims, f"{far(row, target):.1f}x", shown,
                milliseconds(row.least(target)), number(row.waste(SHOWN)), costs(row, lambda one: number(one.slots)),
                f"{best.of} {milliseconds(bound(best, target))}" if best and best.cost else "",
            ]  # fmt: skip


def far(row: Row, target: Target) -> float:
    return bound(row, target) / row.least(target)


def bound(row: Row, target: Target) -> float:
    """Seconds; none can be told of recorded figures."""
    return max((row.bounds(SHOWN, target) or {"": float("inf")}).values())


def other_cells(row: Row) -> list[str]:
    patterns = ", ".join((row.pattern, *row.also))
    if row.code is None:
        return [row.kernel, patterns, row.error, "", "", "", ""]
    code = row.code
    own = [str(code.warps), str(code.registers), spills(code), f"{code.shared / 1024:.0f}", str(code.blocks)]
    return [row.kernel, patterns, *own]


def spills(code: Code) -> str:
    return f"{code.spills_in_loops} / {code.spills_outside}" if code.spills_in_loops or code.spills_outside else "0"


def costs(row: Row, text: Callable[[Cost], str]) -> str:
    """Of each loop."""
    assert row.code is not None
    if not row.per_pair:
        return ""
    wanted = [loop for loop in row.code.loops if loop.wanted]
    return each(wanted, lambda loop: text(cost(loop, row.code.warps, row.per_pair)))  # type: ignore[union-attr]


def each(loops: Sequence[LoopCode], text: Callable[[LoopCode], str], between: str = ", ") -> str:
    """Once where all of them are alike."""
    return between.join(dict.fromkeys(map(text, loops)))


def joined(numbers: Iterable[float]) -> str:
    """Once where all of them are alike."""
    return " / ".join(dict.fromkeys(map(number, numbers)))


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"
