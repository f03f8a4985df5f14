"""published: the formula that papers give for the keys of a decode step, beside the exact count."""

from __future__ import annotations

from fractions import Fraction

from spdsl.ir.pattern import Gate, Merge, Phase, Softmax
from spdsl.ir.plan import Form, Plan, SoftmaxPlan, Sweep
from spdsl.ir.rule import TopK
from spdsl.passes.count import Count, Shape
from spdsl.passes.visible import DependsOnData, Visible, bits

FAR = 65536  # tokens: the tests of the three branches are looked at here


def published(plan: Plan, length: int) -> Fraction | None:
    """(s - l) / d + n l' + w of NSA (arXiv 2502.11089, section 3) for entries, top_k units and a window; else None.

    It has one entry less than there are.
    """
    try:
        branch = Count(plan, length, Shape()).case(Phase.DECODE).branch
    except DependsOnData:
        return None
    if not isinstance(branch, Gate | Merge) or len(branch.branches) != 3:
        return None
    names = {part.name for part in branch.branches if isinstance(part, Softmax)}
    parts = [one for one in plan.softmaxes if one.name in names and len(one.sweeps) == 1]
    entries = [found for part in parts if (found := _entries(part, length)) is not None]
    units = [number for part in parts if (number := _units(part)) is not None]
    windows = [number for part in parts if (number := _window(part)) is not None]
    if (len(entries), len(units), len(windows)) != (1, 1, 1):
        return None
    return entries[0] + units[0] + windows[0]


def _entries(part: SoftmaxPlan, length: int) -> Fraction | None:
    """(s - l) / d where the query sees every closed entry."""
    sweep, grid = part.sweeps[0], part.sweeps[0].stream.grid
    if sweep.stream.compress is None or part.units is not None or grid.before or grid.partial:
        return None
    closed = all(
        _keys(sweep, q, grid.count(FAR)) == bits(0, grid.count(q + 1))
        for q in (FAR - 1, FAR // 2, FAR // 2 + grid.stride - 1)
    )
    return Fraction(length - grid.width, grid.stride) if closed else None


def _units(part: SoftmaxPlan) -> int | None:
    """n l' where the query sees the chosen units up to itself."""
    choice = part.units
    if choice is None or not isinstance(choice.rule, TopK) or choice.count is None:
        return None
    return choice.count * choice.unit if _keys(part.sweeps[0], FAR // 2, FAR) == bits(0, FAR // 2 + 1) else None


def _window(part: SoftmaxPlan) -> int | None:
    """w where the query sees the last w tokens."""
    sweep = part.sweeps[0]
    if not sweep.stream.grid.is_tokens or sweep.form is not Form.RANGES:
        return None
    seen = [_keys(sweep, q, FAR) for q in (FAR - 1, FAR // 2 + 3)]
    width = seen[0].bit_count()
    recent = seen == [bits(FAR - width, FAR), bits(FAR // 2 + 4 - width, FAR // 2 + 4)] if width < FAR // 2 else False
    return width if recent else None


def _keys(sweep: Sweep, q: int, length: int) -> int:
    try:
        return Visible(sweep.test, length).keys(q)
    except DependsOnData:
        return -1  # equals no set
