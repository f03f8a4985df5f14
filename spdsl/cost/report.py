"""report: curves as tables and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from spdsl.cost.crossing import told
from spdsl.cost.efficiency import borrowed, efficiency, launch_seconds
from spdsl.cost.estimate import Curve, Point
from spdsl.cost.kernels import Kernel
from spdsl.cost.roofline import time
from spdsl.passes.count import Number, Shape
from spdsl.tables import Column, Fitted
from spdsl.targets import Target


def table(curve: Curve) -> Fitted:
    fitted = Fitted(f"{curve.stage.value} on {curve.target.name}: {sizes(curve.shape)}", _columns(), legend=False)
    for point in curve.points:
        fitted.add_row(*_row(point))
    return fitted


def _columns() -> tuple[Column, ...]:
    return (
        Column("tokens"),
        Column("time", "of one call of one layer, estimated"),
        Column("dense", "time of the best dense attention on that GPU"),
        Column("speedup", "dense / time, below 1x dense attention is faster"),
        Column("choosing", "share of the time that goes into choosing keys", spare=5),
        Column("FLOPs", "of the visible pairs", spare=2),
        Column("FLOPs run", "with the hidden pairs of visited tiles and padding", spare=3),
        Column("bytes", "read and written", spare=1),
        Column("kernels", "launches of one call", spare=4),
        Column("torch ops", "operators of PyTorch around them", spare=6),
    )


def _row(point: Point) -> tuple[str, ...]:
    bound = "" if point.exact else "<= "
    return (
        f"{point.length:,}",
        bound + duration(point.seconds),
        duration(point.dense),
        f"{'' if point.exact else '>= '}{point.ratio:.2f}x",
        f"{point.selecting:.0%}" if point.selecting else "",
        number(point.flops),
        number(point.machine),
        number(point.moved),
        f"{point.launches}",
        f"{point.operators}" if point.operators else "",
    )


def detail(point: Point, target: Target, size: int) -> Fitted:
    """The kernels of one call."""
    columns = (
        Column("kernel", words=True),
        Column("part", words=True, spare=3),
        Column("time"),
        Column("bound by", "what the time of a kernel is made of", words=True),
        Column("FLOPs", spare=2),
        Column("FLOPs run", spare=4),
        Column("bytes", spare=1),
    )
    fitted = Fitted(f"its kernels at {point.length:,} tokens", columns, legend=False)
    for kernel in point.kernels:
        fitted.add_row(
            kernel.name, kernel.part, duration(time(kernel, target, size).seconds), bound(kernel, target, size),
            number(kernel.flops), number(kernel.machine), number(kernel.moved),
        )  # fmt: skip
    return fitted


def bounds(curves: Sequence[Curve]) -> str:
    """What `<=` stands for, if it is there."""
    exact = all(point.exact for curve in curves for point in curve.points)
    return "" if exact else "<= and >=: the data decide, and this is the worst case (--density and --overlap change it)"


def bound(kernel: Kernel, target: Target, size: int) -> str:
    """What its time is made of."""
    spent = time(kernel, target, size)
    parts = {
        "products": spent.products,
        "exponentials": spent.exponentials,
        "bytes": spent.bytes,
        "launches": spent.launches,
    }
    return max(parts, key=lambda name: parts[name])


def crossing(curve: Curve) -> str:
    return f"{curve.stage.value}: {told(curve.crossings, curve.wins_first, [point.length for point in curve.points])}"


def notes(target: Target) -> Iterator[str]:
    """What the numbers of a GPU rest on."""
    for owner, kinds in borrowed(target.name).items():
        named = ", ".join(kind.replace("_", " ") for kind in kinds)
        yield f"for want of published speeds on {target.name} those on {owner} are taken: {named}"
    if not target.exponentials:
        yield f"for want of a published rate exponentials on {target.name} cost nothing here"


def sizes(shape: Shape) -> str:
    dims = f"dim {shape.qk}" if shape.qk == shape.v else f"dims {shape.qk} and {shape.v}"
    heads = f"{shape.heads} query and {shape.kv_heads} key heads"
    return f"batch {shape.batch}, {heads}, {dims}, {shape.size} bytes an element"


def duration(seconds: float) -> str:
    """Three digits with a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def number(value: Number) -> str:
    """Three digits with a prefix; `<=` for a bound."""
    sign, size = "" if value.exact else "<= ", float(value.value)
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if size >= scale:
            return f"{sign}{size / scale:.3g} {prefix}"
    return f"{sign}{size:.3g}"


# ---- JSON


def document(name: str, curves: Sequence[Curve]) -> dict[str, Any]:
    targets = {curve.target.name: curve.target for curve in curves}
    return {
        "pattern": name,
        "curves": [_curve(curve) for curve in curves],
        "efficiencies": {gpu: _efficiencies(target) for gpu, target in targets.items()},
        "seconds_per_launch": launch_seconds(),
    }


def _curve(curve: Curve) -> dict[str, Any]:
    shape = curve.shape
    return {
        "phase": curve.stage.value,
        "target": curve.target.name,
        "shape": {name: getattr(shape, name) for name in ("batch", "heads", "kv_heads", "qk", "v", "size")},
        "overtakes": [{"length": change.length, "faster": change.wins} for change in curve.crossings],
        "points": [_point(point, curve) for point in curve.points],
    }


def _point(point: Point, curve: Curve) -> dict[str, Any]:
    return {
        "length": point.length,
        "seconds": point.seconds,
        "dense_seconds": point.dense,
        "speedup": point.ratio,
        "selection": point.selecting,
        "exact": point.exact,
        "flops": point.flops.value,
        "machine": point.machine.value,
        "moved": point.moved.value,
        "launches": point.launches,
        "torch": point.operators,
        "kernels": [_kernel(kernel, curve) for kernel in point.kernels],
    }


def _kernel(kernel: Kernel, curve: Curve) -> dict[str, Any]:
    counts = {name: getattr(kernel, name).value for name in ("flops", "machine", "exps", "bytes", "moved")}
    return {
        "name": kernel.name,
        "part": kernel.part,
        "launches": kernel.launches,
        "torch": kernel.operators,
        **counts,
        "exact": kernel.machine.exact and kernel.moved.exact,
        "seconds": time(kernel, curve.target, curve.shape.size).seconds,
    }


def _efficiencies(target: Target) -> dict[str, Any]:
    from spdsl.cost.efficiency import KINDS

    shares = {}
    for kind in KINDS:
        share = efficiency(target.name, kind)
        shares[kind] = {
            "value": share.value,
            "of": share.of,
            "gpu": share.gpu,
            "derived": share.derived,
            "source": share.source,
        }
    return shares
