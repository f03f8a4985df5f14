"""pages: the pages of the cache against the units of a choice and the blocks of the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from math import gcd

from spdsl.checks.kernels import launches
from spdsl.checks.view import View, warning
from spdsl.diagnostics import Applicability, Diagnostic, Hint, Span
from spdsl.ir.pattern import LEAST_BLOCK
from spdsl.passes.source_numbers import argument, statement
from spdsl.primitives.grains import nearest
from spdsl.runtime.tuning.configs import TABLES, lookup
from spdsl.runtime.tuning.unit_configs import UNIT_TABLES


def spread(unit: int, block: int) -> Fraction:
    """What the blocks that an aligned unit touches hold, over the unit, in the mean over its places."""
    count = block // gcd(unit, block)
    touched = sum(-(-(i * unit % block + unit) // block) for i in range(count))
    return Fraction(touched * block, count * unit)


def pages_and_units(view: View) -> Iterator[Diagnostic]:
    """What is moved with whole pages in place of units. The kernels read the units alone."""
    page = view.expected.page
    choices = dict.fromkeys(softmax.units for softmax in view.plan.softmaxes if softmax.units is not None)
    for choice in choices if page else ():
        assert page is not None
        factor = spread(choice.unit, page)
        if factor == 1 or choice.unit < LEAST_BLOCK:  # lists of so short units are not made for whole pages
            continue
        touched = float(factor * choice.unit / page)
        unit, own = argument(view.tree, choice.span, "unit"), argument(view.tree, _expect(view), "page")
        wanted, fitting = nearest(choice.unit, page), choice.unit & -choice.unit
        hints = [unit.hint(f"units of {wanted} tokens are whole pages", choice.unit, wanted, Applicability.MAYBE)
                 if unit else Hint(f"units of {wanted} tokens are whole pages")]  # fmt: skip
        if own and LEAST_BLOCK <= fitting < page:
            hints.append(own.hint(f"pages of {fitting} tokens fit the units", page, fitting, Applicability.MAYBE))
        yield warning(
            "W503",
            f"a unit of {choice.unit} tokens touches {touched:.3g} {'page' if touched == 1 else 'pages'} of {page} on "
            f"average: {float(factor):.3g} times its tokens",
            unit.place if unit else choice.span,
            "units and pages do not fit",
            "a cache that moves whole pages moves so much more; the kernels read the units alone",
            hints=tuple(hints),
        )


def small_pages(view: View) -> Iterator[Diagnostic]:
    """A block of keys lies in one page, so small pages make small blocks."""
    page = view.expected.page
    if page is None:
        return
    bounded = {softmax.name: softmax.units.unit for softmax in view.plan.softmaxes if softmax.units is not None}
    of_tokens = [softmax for softmax in view.plan.softmaxes if softmax.sweeps[0].stream.compress is None]
    paged = {softmax.name for softmax in of_tokens}  # entries lie in none
    whole = 0
    for launch in launches(view):
        if launch.kernel.name in ("decode", "units_decode") and launch.of in paged:
            tables = UNIT_TABLES if launch.kernel.name == "units_decode" else TABLES
            dim = max(launch.kernel.qk, launch.kernel.v)
            tuned = lookup(launch.kernel.name, view.architecture, dim, view.shape.size, tables)
            unit = bounded.get(launch.of, tuned.block_n)
            whole = max(whole, min(tuned.block_n, unit & -unit))
    if whole <= page:
        return
    own = argument(view.tree, _expect(view), "page")
    text = f"pages of {whole} tokens hold a whole block"
    yield warning(
        "W512",
        f"pages of {page} tokens make blocks of {page} keys: {whole // page} steps in place of one, each with its "
        "own load of the page's number",
        own.place if own else None,
        f"decode takes blocks of {whole} keys",
        hints=(own.hint(text, page, whole, Applicability.MAYBE) if own else Hint(text),),
    )


def _expect(view: View) -> Span | None:
    return statement(view.tree, "expect")
