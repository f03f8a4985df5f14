"""resident: which tokens a query may still see, where these are the first ones and those of a window.

attend(first(4) | sliding(1020))  ->  (4, 1020)
attend(all)                       ->  None: every token
"""

from __future__ import annotations

import sympy

from spdsl.ir.plan import Plan
from spdsl.ir.symbols import Expr, Q
from spdsl.ir.visit import Range


def resident(plan: Plan) -> tuple[int, int] | None:
    """(first tokens, tokens of the window up to the query's own); None if that is not all that later queries read."""
    sweeps = [sweep for softmax in plan.softmaxes for sweep in softmax.sweeps]
    listed = plan.choices or any(softmax.units for softmax in plan.softmaxes)
    if listed or any(sweep.stream.compress for sweep in sweeps):
        return None
    ranges = [found for sweep in sweeps for found in sweep.decode]
    ends = [(_last(found), _reach(found)) for found in ranges]
    if any(last is None and reach is None for last, reach in ends):
        return None
    windows = [reach for last, reach in ends if last is None and reach is not None]
    return max((last for last, _ in ends if last is not None), default=0), max(windows, default=1)


def _last(found: Range) -> int | None:
    """The end of a range that lies at the beginning, whatever the query."""
    numbers = [int(part) for part in _parts(found.end, sympy.Min) if part.is_Integer]
    return max(0, min(numbers)) if numbers else None


def _reach(found: Range) -> int | None:
    """How many tokens a range reaches back from the query, its own among them."""
    back = [sympy.expand(Q - part) for part in _parts(found.first, sympy.Max)]
    numbers = [int(part) for part in back if part.is_Integer]
    return max(1, min(numbers) + 1) if numbers else None


def _parts(value: Expr, kind: type[sympy.Basic]) -> tuple[Expr, ...]:
    return value.args if isinstance(value, kind) else (value,)
