"""int32: numbers that the kernels keep in 32 bits and that a call of the declared length exceeds.

Strides and addresses have 64 bits. Positions, offsets within a membership map and numbers of (tile, unit)
pairs have 32.
"""

from __future__ import annotations

from collections.abc import Iterator

import sympy

from spdsl.checks.kernels import unit_launches
from spdsl.checks.view import View
from spdsl.diagnostics import Diagnostic, Hint, Span
from spdsl.ir.interval import Unbounded, bounds
from spdsl.ir.pattern import Choice, Softmax
from spdsl.ir.plan import Sweep
from spdsl.ir.symbols import K_FIRST, K_LAST, LENGTH, Q_FIRST, Q_LAST, Expr, H, lookups
from spdsl.passes.count import Count

MOST = 2**31 - 1


def maps(view: View) -> Iterator[Diagnostic]:
    """Membership maps of given and drawn sets: a byte for each (list head, tile of rows, unit) of a sequence."""
    told: set[Choice] = set()
    for softmax in view.plan.softmaxes:
        for choice in softmax.reads:
            if not isinstance(choice, Choice) or choice.listed or choice in told or not view.expected.length:
                continue
            told.add(choice)
            heads = view.query_heads(softmax.softmax) if choice.share == "head" else view.plan.pattern.kv_heads
            rows, units = -(-view.length // choice.rows), view.units(choice)
            size = (heads or 1) * rows * units
            if size > MOST:
                yield _exceeds(
                    view, choice.span, size, f"the map of `{choice.name}` has {size:,} entries",
                    f"{heads or 1} heads x {rows:,} tiles of rows x {units:,} units, a byte each",
                    "larger `rows` and `unit` make it smaller",
                )  # fmt: skip


def positions(view: View) -> Iterator[Diagnostic]:
    """Products and sums of positions in tests and biases."""
    for softmax in view.plan.softmaxes if view.expected.length else ():
        for sweep in softmax.sweeps:
            for value in (sweep.test, *([softmax.softmax.bias] if softmax.softmax.bias is not None else [])):
                found = _largest(view, value, sweep, softmax.softmax)
                if found is not None:
                    expression, size = found
                    yield _exceeds(
                        view, softmax.softmax.span, size, f"`{expression}` reaches {size:,}",
                        "positions and what is computed from them are 32-bit integers in the kernels",
                        "divide before you multiply, or compare with a quotient",
                    )  # fmt: skip
                    return


def pairs_of_units(view: View) -> Iterator[Diagnostic]:
    """(tile, unit) pairs of one kv head, which dK and dV walk by number."""
    for softmax in view.plan.softmaxes if view.expected.length else ():
        choice = softmax.units
        if choice is None:
            continue
        heads = view.query_heads(softmax.softmax) or view.shape.heads
        kv_heads = view.kv_heads(softmax.sweeps[0].stream) or view.shape.kv_heads
        per_kv = max(1, heads // kv_heads) if choice.share == "head" else 1
        for one in unit_launches(view, softmax):
            if one.kernel.name != "units_dkdv":
                continue
            listed = one.lanes * (choice.capacity or view.units(choice))
            width = min(listed, -(-view.length // choice.whole_unit))  # short units are taken together
            tiles = view.expected.batch * per_kv * -(-view.length // one.lanes)
            if tiles * width > MOST:
                yield _exceeds(
                    view, choice.span, tiles * width, f"the backward of `{softmax.name}` has {tiles * width:,} "
                    "(tile, unit) pairs for a kv head",
                    f"{tiles:,} tiles of {one.lanes} {'query' if one.lanes == 1 else 'queries'}, "
                    f"{width:,} units each at most",
                    "a smaller batch, fewer units, or `share = group` needs fewer",
                )  # fmt: skip


def _largest(view: View, value: sympy.Basic, sweep: Sweep, softmax: Softmax) -> tuple[Expr, int] | None:
    """A whole part of an expression that exceeds 32 bits, without reads, and how far it gets."""
    entries = Count(view.plan, view.length, view.shape).entries(sweep.stream)
    heads = view.query_heads(softmax) or view.shape.heads
    ends = {Q_FIRST: 0, Q_LAST: view.length - 1, K_FIRST: 0, K_LAST: max(0, entries - 1), LENGTH: view.length}
    for part in sympy.postorder_traversal(value):
        if not isinstance(part, sympy.Add | sympy.Mul) or not part.is_integer or lookups(part):
            continue
        try:
            low, high = bounds(part)
        except Unbounded:
            continue
        corners = [end.xreplace({**_exact(ends), H: sympy.Integer(h)}) for end in (low, high) for h in (0, heads - 1)]
        most = max((abs(int(corner)) for corner in corners if corner.is_Integer), default=0)
        if most > MOST:
            return part, most
    return None


def _exact(ends: dict[sympy.Symbol, int]) -> dict[sympy.Symbol, sympy.Integer]:
    return {symbol: sympy.Integer(value) for symbol, value in ends.items()}


def _exceeds(view: View, span: Span | None, size: int, message: str, note: str, hint: str) -> Diagnostic:
    return Diagnostic(
        "E521",
        f"{message} {view.at_length}, above the {MOST:,} of 32 bits",
        span,
        f"{size / 2**31:.3g} times too many" if size >= 2**32 else "too many",
        (note,),
        (Hint(hint),),
    )
